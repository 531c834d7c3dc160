"""Features combine: any two, in either order, paint what they say together, or refuse in one sentence and change nothing.

Oracle: what offloading, caching, tiles, compiling and the modulation ahead of time paint is what the model paints without them."""

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

PICTURE = Image.effect_noise((40, 30), 90).convert("RGB")
# Those that change what is painted, in the order in which they are put together for the comparison.
NUMBERS = ("lora", "int8", "ip")
# What refuses what came before it: (first, second) -> a word of the sentence.
REFUSED = {
    ("offload", "lora"): "offloaded", ("offload", "int8"): "offloaded", ("offload", "offload"): "offloaded already",
    ("cache", "cache"): "cached already",
    ("compile", "compile"): "compiled already",
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    flux = load(small_pipeline(tmp_path_factory.mktemp("pair") / "flux"), device="cpu")
    torch.manual_seed(0)
    config = MMDiTConfig(vec_in_dim=24, context_in_dim=32, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(4, 14, 14))
    return replace(flux, mmdit=MMDiT(config).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    draw = torch.Generator().manual_seed(5)
    save_file({f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{kind}.weight": torch.randn(shape, generator=draw)
               for kind, shape in (("A", (4, 64)), ("B", (192, 4)))}, path / "lora.safetensors")
    save_file(ip_adapter_state(hidden=64), path / "ip.safetensors")
    clip_vision().save_pretrained(path / "image_encoder")
    return {"lora": lambda flux: add_lora(flux, path / "lora.safetensors"), "int8": lambda flux: quantize(flux, "int8"),
            "ip": lambda flux: add_ip_adapter(flux, path / "ip.safetensors"), "offload": lambda flux: offload(flux, "cpu", "block"),
            "cache": lambda flux: cache(flux, "first_block", threshold=1e-9), "tile": lambda flux: tile(flux, 64),
            "compile": lambda flux: compile(flux, backend="eager"), "modulation": precompute_modulation}


def paint(flux):
    return generate(flux, "a red apple", width=48, height=32, steps=3, max_text_tokens=8, output="tensor", progress=False,
                    ip_image=PICTURE if flux.ip_adapters else None)


@pytest.mark.parametrize("first, second", [
    pair for pair in itertools.product(("lora", "int8", "ip", "offload", "cache", "tile", "compile", "modulation"), repeat=2)
    if pair[0] != pair[1] or pair in REFUSED])                                  # twice the same is tested with the feature itself
def test_two_features_paint_together_or_refuse(flux, features, first, second):
    if (first, second) in REFUSED:
        changed = features[first](flux)
        with pytest.raises(ValueError, match=REFUSED[first, second]) as refusal:
            features[second](changed)
        assert "\n" not in str(refusal.value)
        return
    expected = flux
    for name in NUMBERS:
        expected = features[name](expected) if name in (first, second) else expected
    together, expected = paint(features[second](features[first](flux))), paint(expected)
    # Note: the modulation that is apart is not within the blocks any more, and so is not quantised.
    assert (together - expected).abs().max() < (1e-3 if (first, second) == ("modulation", "int8") else 1e-5)
    if {first, second} & set(NUMBERS):
        assert (expected - paint(flux)).abs().max() > 1e-4
