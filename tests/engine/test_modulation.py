"""Modulation ahead of time. Oracles: the model without it, whose images are the same bit for bit;
the official sizes by counting."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from miniflux import add_lora, generate, image_to_image, load, remove_lora
from miniflux.engine import modulation
from miniflux.engine.modulation import precompute_modulation
from miniflux.flux import Flux, FluxConfig
from miniflux.networks.mmdit import MMDiT
from miniflux.sampling import flow

SMALL = dict(width=64, height=48, max_text_tokens=8, output="tensor", progress=False)


@pytest.fixture(scope="module")
def flux(small_folder):
    return load(small_folder, device="cpu")


@pytest.fixture(scope="module")
def ahead(flux):
    return precompute_modulation(flux)


@pytest.mark.parametrize("keywords", [
    dict(steps=3),
    dict(steps=1, guidance=1.0),
    dict(sigmas=[1.0, 0.6, 0.1]),
    dict(steps=2, num_images=3),
    dict(steps=2, negative_prompt="an owl", true_cfg=3.0),
], ids=str)
def test_an_image_is_the_same_bit_for_bit(flux, ahead, keywords):
    """True CFG evaluates two prompts at each step."""
    prompts = ["a red apple", "two cats"]
    expected = generate(flux, prompts, **SMALL, **keywords)
    assert torch.equal(generate(ahead, prompts, **SMALL, **keywords), expected)


def test_in_bfloat16_too(small_folder):
    flux = load(small_folder, device="cpu", dtype=torch.bfloat16)
    ahead = precompute_modulation(flux)
    expected = generate(flux, "an owl", steps=3, **SMALL)
    assert torch.equal(generate(ahead, "an owl", steps=3, **SMALL), expected)


def test_a_schedule_that_begins_in_the_middle_is_the_same(flux, ahead):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    keywords = SMALL | dict(steps=5, strength=0.5)
    expected = image_to_image(flux, "an owl", image, **keywords)
    assert torch.equal(image_to_image(ahead, "an owl", image, **keywords), expected)


def test_more_steps_than_are_held_at_once_are_the_same(flux, ahead, monkeypatch):
    asked = []
    layers, = ahead.mmdit.precomputed
    layers.register_forward_pre_hook(lambda layers, inputs: asked.append(len(inputs[1])))
    monkeypatch.setattr(modulation, "LIMIT", 5)
    keywords = SMALL | dict(steps=7, num_images=2)
    expected = generate(flux, "an owl", **keywords)
    assert torch.equal(generate(ahead, "an owl", **keywords), expected)
    assert asked == [2, 2, 2, 1]


def test_a_time_that_was_not_announced_is_computed_when_it_is_needed(flux, ahead):
    txt = torch.randn(2, 5, 32)
    vec = torch.randn(2, 24)
    x = torch.randn(2, 16, 6, 8)
    usual = flow(flux.mmdit, txt, vec, 3.5, 6, 8)
    looked_up = flow(ahead.mmdit, txt, ahead.mmdit.prepare(vec, 3.5, [1.0, 0.5, 0.0]), 3.5, 6, 8)
    for t in (1.0, 0.75, 0.5, 0.25, 1.0):
        assert torch.equal(usual(x, t), looked_up(x, t))


def test_the_given_model_and_the_weights_stay_as_they_are(flux, ahead):
    precomputed, = ahead.mmdit.precomputed
    weight = flux.mmdit.double_blocks[0].img_mod.lin.weight
    assert weight is precomputed.layers[0].lin.weight
    assert ahead.mmdit.img_in is flux.mmdit.img_in
    assert precompute_modulation(ahead) is ahead
    vec = torch.randn(1, 24)
    assert flux.mmdit.prepare(vec, 3.5, [1.0, 0.0]) is vec                 # off: nothing happens


def test_the_transformer_of_dev_has_16_gib_without_its_modulation():
    """In bfloat16. Of the 11,901,408,320 parameters, 3,247,448,064 modulate,
    and 32,262,144 compute the vector that those are applied to."""
    def parameters(network):
        return sum(p.numel() for p in network.parameters())

    with torch.device("meta"):
        mmdit = MMDiT()
    rest = precompute_modulation(Flux(None, None, None, None, mmdit, None, FluxConfig())).mmdit
    apart, = rest.precomputed
    assert parameters(mmdit) == 11_901_408_320
    assert parameters(apart) == 3_247_448_064 + 32_262_144
    assert parameters(rest) == parameters(mmdit) - parameters(apart)
    assert round(2 * parameters(mmdit) / 2**30, 2) == 22.17
    assert 2 * parameters(rest) / 2**30 < 16.1


MEASURE = """
import gc, re, torch
from pathlib import Path
from miniflux.engine.modulation import precompute_modulation
from miniflux.flux import Flux, FluxConfig
from miniflux.networks.mmdit import MMDiT, MMDiTConfig
from miniflux.sampling import flow

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_grad_enabled(False)
config = MMDiTConfig(hidden_size=1024, num_heads=8, depth=2, depth_single_blocks=4)
flux = Flux(None, None, None, None, MMDiT(config), None, FluxConfig())
rest = precompute_modulation(flux).mmdit
x, txt, vec = torch.randn(1, 16, 4, 4), torch.randn(1, 4, 4096), torch.randn(1, 768)
ahead = rest.prepare(vec, 3.5, [1.0, 0.5, 0.0])
expected = [flow(flux.mmdit, txt, vec, 3.5, 4, 4)(x, t) for t in (1.0, 0.5)]
given = [flow(rest, txt, ahead, 3.5, 4, 4)(x, t) for t in (1.0, 0.5)]
assert all(map(torch.equal, expected, given))
whole = sum(p.nbytes for p in flux.mmdit.parameters())
before = resident()
del flux, ahead.layers, rest.precomputed                       # what was looked up remains
gc.collect()
after = resident()
assert torch.equal(flow(rest, txt, ahead, 3.5, 4, 4)(x, 0.5), expected[1])
print((before - after) / whole)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_the_modulations_memory_is_free_once_its_vectors_are_known():
    """29% of a small transformer of the official proportions, with the embedders:
    the step runs without them."""
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.25 < float(result.stdout) < 0.35


# ------------------------------------------------------------------------ with the rest


def lora_file(path, mmdit, modules):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in modules:
        layer = mmdit.get_submodule(name)
        down = torch.randn(2, layer.in_features, generator=generator) / 4
        up = torch.randn(layer.out_features, 2, generator=generator) / 4
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, path)
    return path


@pytest.mark.parametrize("merge", [True, False])
def test_loras_on_modulation_layers_are_in_what_is_computed_ahead(flux, tmp_path, merge):
    file = lora_file(tmp_path / "a.safetensors", flux.mmdit, [
        "double_blocks.0.img_mod.lin",
        "single_blocks.1.modulation.lin",
        "time_in.in_layer",
        "final_layer.adaLN_modulation.1",
    ])
    changed = add_lora(flux, file, merge=merge)
    ahead = precompute_modulation(changed)
    expected = generate(changed, "an owl", steps=2, **SMALL)
    assert torch.equal(generate(ahead, "an owl", steps=2, **SMALL), expected)
    plain = generate(flux, "an owl", steps=2, **SMALL)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_a_lora_on_other_layers_may_come_after_and_shares_what_is_apart(flux, ahead, tmp_path):
    file = lora_file(tmp_path / "a.safetensors", flux.mmdit, ["double_blocks.0.img_attn.qkv"])
    changed = add_lora(ahead, file)
    expected = generate(add_lora(flux, file), "an owl", steps=2, **SMALL)
    assert torch.equal(generate(changed, "an owl", steps=2, **SMALL), expected)
    assert changed.mmdit.precomputed[0] is ahead.mmdit.precomputed[0]
    assert remove_lora(changed).mmdit is ahead.mmdit


@pytest.mark.parametrize("layer", [
    "double_blocks.0.img_mod.lin",
    "final_layer.adaLN_modulation.1",
    "time_in.in_layer",
])
def test_a_lora_on_modulation_layers_that_comes_after_is_refused(flux, ahead, tmp_path, layer):
    file = lora_file(tmp_path / "a.safetensors", flux.mmdit, [layer])
    sentence = ("modulation of this transformer is apart from it: "
                "add LoRAs of its layers before")
    with pytest.raises(ValueError, match=sentence):
        add_lora(ahead, file)


def test_a_plain_vector_is_refused_in_one_sentence(ahead):
    velocity = flow(ahead.mmdit, torch.randn(1, 5, 32), torch.randn(1, 24), 3.5, 6, 8)
    sentence = "the modulation of this transformer is precomputed: give it mmdit.prepare"
    with pytest.raises(ValueError, match=sentence):
        velocity(torch.randn(1, 16, 6, 8), 1.0)
