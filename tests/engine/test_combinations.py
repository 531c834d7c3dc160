"""Features combine: any two, in either order, have the effect of both,
or are refused in one sentence and change nothing.

Oracle: offloading, caching, tiles, compiling and the modulation ahead of time do not change
the image that the model generates without them.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image
from reference import clip_vision, ip_adapter_state, small_pipeline
from safetensors.torch import save_file

from miniflux import add_ip_adapter, add_lora, generate, load, quantize
from miniflux.engine.caching import cache
from miniflux.engine.compiling import compile
from miniflux.engine.modulation import precompute_modulation
from miniflux.engine.offload import offload
from miniflux.engine.tiling import tile
from miniflux.networks.mmdit import MMDiT, MMDiTConfig

IMAGE = Image.effect_noise((40, 30), 90).convert("RGB")
FEATURES = ("lora", "int8", "ip", "offload", "cache", "tile", "compile", "modulation")
# Those that change the image, in the order in which they are put together for the comparison.
NUMBERS = ("lora", "int8", "ip")
# What is refused after another feature: (first, second) -> a word of the sentence.
REFUSED = {
    ("offload", "lora"): "offloaded",
    ("offload", "int8"): "offloaded",
    ("offload", "offload"): "offloaded already",
    ("cache", "cache"): "cached already",
    ("compile", "compile"): "compiled already",
}
# Twice the same is tested with the feature itself.
PAIRS = [(first, second) for first, second in itertools.product(FEATURES, repeat=2)
         if first != second or (first, second) in REFUSED]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    flux = load(small_pipeline(tmp_path_factory.mktemp("pair") / "flux"), device="cpu")
    torch.manual_seed(0)
    config = MMDiTConfig(vec_in_dim=24, context_in_dim=32, hidden_size=64, num_heads=2,
                         depth=2, depth_single_blocks=2, axes_dim=(4, 14, 14))
    return replace(flux, mmdit=MMDiT(config).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    draw = torch.Generator().manual_seed(5)
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({
        f"{layer}.lora_A.weight": torch.randn(4, 64, generator=draw),
        f"{layer}.lora_B.weight": torch.randn(192, 4, generator=draw),
    }, path / "lora.safetensors")
    save_file(ip_adapter_state(hidden=64), path / "ip.safetensors")
    clip_vision().save_pretrained(path / "image_encoder")
    return {
        "lora": lambda flux: add_lora(flux, path / "lora.safetensors"),
        "int8": lambda flux: quantize(flux, "int8"),
        "ip": lambda flux: add_ip_adapter(flux, path / "ip.safetensors"),
        "offload": lambda flux: offload(flux, "cpu", "block"),
        "cache": lambda flux: cache(flux, "first_block", threshold=1e-9),
        "tile": lambda flux: tile(flux, 64),
        "compile": lambda flux: compile(flux, backend="eager"),
        "modulation": precompute_modulation,
    }


def paint(flux):
    return generate(flux, "a red apple", width=48, height=32, steps=3, max_text_tokens=8,
                    ip_image=IMAGE if flux.ip_adapters else None,
                    output="tensor", progress=False)


@pytest.mark.parametrize("first, second", PAIRS)
def test_two_features_act_together_or_are_refused(flux, features, first, second):
    if (first, second) in REFUSED:
        changed = features[first](flux)
        with pytest.raises(ValueError, match=REFUSED[first, second]) as refusal:
            features[second](changed)
        assert "\n" not in str(refusal.value)
        return
    plain = flux
    for name in NUMBERS:
        if name in (first, second):
            plain = features[name](plain)
    expected = paint(plain)
    together = paint(features[second](features[first](flux)))
    # Note: the modulation that is apart is not within the blocks any more, so it is not quantised.
    bound = 1e-3 if (first, second) == ("modulation", "int8") else 1e-5
    assert (together - expected).abs().max() < bound
    if {first, second} & set(NUMBERS):
        assert (expected - paint(flux)).abs().max() > 1e-4
