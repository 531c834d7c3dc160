"""`generate` without the references: outputs, seeds, keywords, mistakes. Oracle: by hand; parity is in tests/parity."""

import importlib
import subprocess
import sys

import pytest
import torch
from PIL import Image

import miniflux
from miniflux import encode_prompt, generate, load
from miniflux.latents import decode, encode


@pytest.fixture(scope="module")
def flux(small_folder):
    return load(small_folder, device="cpu")


SMALL = dict(width=32, height=48, steps=2, max_text_tokens=8)


def test_pil_tensor_and_latents_are_the_same_picture(flux):
    picture, = generate(flux, "a red apple", **SMALL)
    tensor = generate(flux, "a red apple", output="tensor", **SMALL)
    latents = generate(flux, "a red apple", output="latents", **SMALL)
    assert isinstance(picture, Image.Image) and picture.size == (32, 48)
    assert tensor.shape == (1, 3, 48, 32) and 0 <= tensor.min() and tensor.max() <= 1 and latents.shape == (1, 16, 6, 4)
    assert picture.getpixel((5, 7)) == tuple((tensor[0, :, 7, 5] * 255).round().int().tolist())
    assert torch.equal(flux.autoencoder.decode(latents).div(2).add(0.5).clamp(0, 1), tensor)


def test_a_batch_equals_its_singles(flux):
    batch = generate(flux, ["a red apple", "two blue cats"], seed=5, num_images=2, output="tensor", **SMALL)
    singles = [generate(flux, prompt, seed=seed, output="tensor", **SMALL)
               for prompt, seed in (("a red apple", 5), ("a red apple", 6), ("two blue cats", 7), ("two blue cats", 8))]
    assert torch.allclose(batch, torch.cat(singles), atol=1e-5)


def test_an_encoded_prompt_paints_what_its_text_paints(flux):
    prompt = encode_prompt(flux, "a red apple", 8)
    assert torch.equal(generate(flux, prompt, output="tensor", **SMALL), generate(flux, "a red apple", output="tensor", **SMALL))


def test_on_step_is_called_once_a_step_with_latents(flux):
    seen = []
    generate(flux, "a red apple", on_step=lambda step, t, x: seen.append((step, t, x.shape)), **SMALL)
    assert [step for step, _, _ in seen] == [0, 1] and seen[0][1] == 1.0 and all(shape == (1, 16, 6, 4) for *_, shape in seen)


def test_true_cfg_of_one_costs_no_second_pass(flux):
    calls = []
    handle = flux.mmdit.register_forward_hook(lambda *_: calls.append(1))
    generate(flux, "a", negative_prompt="b", true_cfg=1.0, **SMALL)
    generate(flux, "a", negative_prompt="b", true_cfg=2.0, **SMALL)
    handle.remove()
    assert len(calls) == 2 + 4


def test_defaults_depend_on_whether_the_model_has_a_guidance_embedding(flux):
    steps = []
    generate(flux, "a", width=16, height=16, max_text_tokens=4, on_step=lambda step, t, x: steps.append(step))
    assert len(steps) == (28 if flux.mmdit.config.guidance_embed else 4)


@pytest.mark.parametrize("keywords, sentence", [
    (dict(width=15), "width is 15: expected a whole number of pixels from 16"),
    (dict(height="64"), "height is '64': expected a whole number"),
    (dict(width=64.0), "width is 64.0"),
    (dict(width=10**6), "width is 1000000"),
    (dict(steps=0), "steps is 0: expected a whole number from 1"),
    (dict(steps=True), "steps is True"),
    (dict(guidance=float("nan")), "guidance is nan: expected a number"),
    (dict(guidance="strong"), "guidance is 'strong'"),
    (dict(seed=-1), "seed is -1"),
    (dict(seed=2**63), "seed is 9223372036854775808"),
    (dict(num_images=0), "num_images is 0"),
    (dict(true_cfg=None), "true_cfg is None"),
    (dict(sigmas=[]), "sigmas are \\[\\]"),
    (dict(sigmas=[0.5, 0.7]), "expected falling numbers"),
    (dict(sigmas=[1.0, 0.0]), "expected falling numbers"),
    (dict(sigmas=[2.0]), "each of the sigmas is 2.0"),
    (dict(sigmas=[1.0, 0.5], steps=3), "give one of them"),
    (dict(output="jpeg"), "output is 'jpeg': expected one of pil, tensor, latents"),
    (dict(max_text_tokens=4096), "max_text_tokens is 4096"),
])
def test_a_value_out_of_range_gets_one_sentence(flux, keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(flux, "a", **(SMALL | {"steps": None} | keywords))


def test_rounding_a_size_is_said_once(flux, caplog):
    generate(flux, "a", width=33, height=47, steps=1, max_text_tokens=4)
    assert [record.message for record in caplog.records] == ["33 x 47 is painted as 32 x 32: sides are multiples of 16"]


def test_generate_is_the_function_whatever_was_imported_before():
    importlib.import_module("miniflux.generate")
    assert callable(miniflux.generate) and callable(importlib.import_module("miniflux.generate").generate)
    code = "import miniflux.generate; from miniflux import generate; import miniflux.generate as again; assert callable(generate) and callable(again)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_the_package_does_no_work():
    code = "import sys, miniflux; assert 'torch' not in sys.modules and {'load', 'generate'} <= set(dir(miniflux))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_results_are_ordinary_tensors_that_can_be_changed_and_trained_on(flux):
    """Inference tensors, which torch neither changes in place nor trains on, must not come out."""
    generate(flux, "a", output="tensor", **SMALL).mul_(255)
    generate(flux, "a", output="latents", **SMALL).add_(1)
    prompt = encode_prompt(flux, "a", 8)
    z = encode(flux, torch.rand(1, 3, 32, 32))
    for given in (prompt.txt, prompt.vec, z, decode(flux, z)):
        scale = torch.ones(1, requires_grad=True)
        with torch.enable_grad():
            (given * scale).sum().backward()
        assert torch.isfinite(scale.grad).all()
