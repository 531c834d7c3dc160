"""`generate` without the references: outputs, seeds, keywords, mistakes.
Oracle: by hand; parity is in tests/parity."""

import importlib
import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import miniflux
from miniflux import encode_prompt, generate, load
from miniflux.latents import decode, encode
from miniflux.sampling import noise


@pytest.fixture(scope="module")
def flux(small_folder):
    return load(small_folder, device="cpu")


SMALL = dict(width=32, height=48, steps=2, max_text_tokens=8)


def test_pil_tensor_and_latents_are_the_same_image(flux):
    image, = generate(flux, "a red apple", **SMALL)
    tensor = generate(flux, "a red apple", output="tensor", **SMALL)
    latents = generate(flux, "a red apple", output="latents", **SMALL)
    assert isinstance(image, Image.Image)
    assert image.size == (32, 48)
    assert tensor.shape == (1, 3, 48, 32)
    assert 0 <= tensor.min()
    assert tensor.max() <= 1
    assert latents.shape == (1, 16, 6, 4)
    assert image.getpixel((5, 7)) == tuple((tensor[0, :, 7, 5] * 255).round().int().tolist())
    assert torch.equal(flux.autoencoder.decode(latents).div(2).add(0.5).clamp(0, 1), tensor)


def test_a_batch_equals_its_singles(flux):
    keywords = SMALL | dict(output="tensor")
    prompts = ["a red apple", "two blue cats"]
    batch = generate(flux, prompts, seed=5, num_images=2, **keywords)
    singles = [
        generate(flux, "a red apple", seed=5, **keywords),
        generate(flux, "a red apple", seed=6, **keywords),
        generate(flux, "two blue cats", seed=7, **keywords),
        generate(flux, "two blue cats", seed=8, **keywords),
    ]
    assert torch.allclose(batch, torch.cat(singles), atol=1e-5)


def test_an_encoded_prompt_gives_the_image_of_its_text(flux):
    prompt = encode_prompt(flux, "a red apple", 8)
    expected = generate(flux, "a red apple", output="tensor", **SMALL)
    assert torch.equal(generate(flux, prompt, output="tensor", **SMALL), expected)


def test_on_step_is_called_once_a_step_with_latents(flux):
    seen = []

    def on_step(step, t, x):
        seen.append((step, t, x.shape))

    generate(flux, "a red apple", on_step=on_step, **SMALL)
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] == 1.0
    for _, _, shape in seen:
        assert shape == (1, 16, 6, 4)


def test_true_cfg_of_one_costs_no_second_pass(flux):
    calls = []
    handle = flux.mmdit.register_forward_hook(lambda *_: calls.append(1))
    generate(flux, "a", negative_prompt="b", true_cfg=1.0, **SMALL)
    generate(flux, "a", negative_prompt="b", true_cfg=2.0, **SMALL)
    handle.remove()
    assert len(calls) == 2 + 4


def test_defaults_depend_on_whether_the_model_has_a_guidance_embedding(flux):
    steps = []
    generate(flux, "a", width=16, height=16, max_text_tokens=4,
             on_step=lambda step, t, x: steps.append(step))
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
    (dict(seed=2**64), "seed is 18446744073709551616"),
    (dict(seed=np.arange(30)), "seed is array"),
    (dict(steps=np.bool_(True)), "steps is np.True_"),
    (dict(on_step=3), "on_step is 3: expected a function"),
    (dict(on_finish="save"), "on_finish is 'save': expected a function"),
    (dict(progress="no"), "progress is 'no': expected True or False"),
    (dict(negative_prompt=3), "the negative prompt must be a string"),
    (dict(sigmas="fast"), "sigmas are 'fast'"),
    (dict(sigmas=[[1.0]]), r"each of the sigmas is \[1.0\]"),
    (dict(output=np.zeros(3)), "output is array"),
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
    with pytest.raises(ValueError, match=sentence) as caught:
        generate(flux, "a", **(SMALL | {"steps": None} | {"on_step": fail} | keywords))
    assert "\n" not in str(caught.value)


def fail(*_) -> None:
    pytest.fail("the first step was begun")


def test_a_model_without_an_autoencoder_is_refused_before_the_first_step(flux):
    without = replace(flux, autoencoder=None)
    for output in ("pil", "tensor"):
        with pytest.raises(ValueError, match="without an autoencoder"):
            generate(without, "a", output=output, on_step=fail, **SMALL)
    assert generate(without, "a", output="latents", **SMALL).shape == (1, 16, 6, 4)


@pytest.mark.parametrize("first, second", [("tiny", "a fox"), ("a fox", None), (None, "a fox")])
def test_a_first_argument_that_is_no_model_gets_one_sentence(flux, first, second):
    sentence = r"the first argument is a .*: expected a model, such as load\(\) returns"
    with pytest.raises(ValueError, match=sentence):
        generate(first, second or flux)


@pytest.mark.parametrize("whole, real", [
    (np.int64, np.float32),
    (np.uint8, np.float64),
    (np.array, np.array),
    (torch.tensor, torch.tensor),
])
def test_numbers_of_numpy_and_torch_are_numbers(flux, whole, real):
    """Oracle: the same call with Python's numbers."""
    expected = generate(flux, "a", width=32, height=48, steps=2, seed=3, guidance=2.5,
                        max_text_tokens=8, output="tensor")
    found = generate(
        flux, "a", width=whole(32), height=whole(48), steps=whole(2), seed=whole(3),
        guidance=real(2.5), num_images=whole(1), max_text_tokens=whole(8), true_cfg=real(1.0),
        output="tensor", progress=np.bool_(False))
    assert torch.equal(found, expected)


def test_sigmas_of_numpy_and_torch_are_numbers(flux):
    """Oracle: the same call with Python's numbers."""
    keywords = SMALL | dict(steps=None, output="tensor")
    sigmas = [1.0, 0.5, 0.25]
    expected = generate(flux, "a", sigmas=sigmas, **keywords)
    for given in (
        tuple(sigmas),
        np.array(sigmas),
        np.array(sigmas, np.float32),
        torch.tensor(sigmas),
    ):
        assert torch.equal(generate(flux, "a", sigmas=given, **keywords), expected)


def test_seeds_go_as_far_as_pytorchs_and_then_begin_again(flux):
    """Oracle: `torch.randn` with the same generator."""
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        expected = torch.randn(1, 16, 4, 4, generator=torch.Generator("cpu").manual_seed(seed))
        assert torch.equal(noise([seed], 4, 4), expected)
    images = generate(flux, "a", seed=2**64 - 1, num_images=2, **SMALL)
    assert [image.info["seed"] for image in images] == [2**64 - 1, 0]
    both = generate(flux, "a", seed=2**64 - 1, num_images=2, output="tensor", **SMALL)
    second = generate(flux, "a", seed=0, output="tensor", **SMALL)
    assert torch.allclose(both[1:], second, atol=1e-5)


def test_what_on_finish_returns_by_mistake_does_not_cost_the_images(flux, caplog):
    def finish_with(result):
        return generate(flux, "a", output="tensor", on_finish=lambda images: result, **SMALL)

    expected = generate(flux, "a", output="tensor", **SMALL)
    assert torch.equal(finish_with(None), expected)
    assert not caplog.records
    for mistake in (3, [expected], expected[0], expected.permute(0, 2, 3, 1)):
        assert torch.equal(finish_with(mistake), expected)
    assert len(caplog.records) == 4
    assert "on_finish returned a int, expected images" in caplog.records[0].message


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_without_stderr_there_is_no_bar(flux, monkeypatch, stderr):
    """As in a windowed program, or after 2>&-."""
    if stderr == "closed":
        stderr = io.StringIO()
        stderr.close()
    monkeypatch.setattr("sys.stderr", stderr)
    assert len(generate(flux, "a", progress=True, **SMALL)) == 1


def test_rounding_a_size_is_logged_once(flux, caplog):
    generate(flux, "a", width=33, height=47, steps=1, max_text_tokens=4)
    message, = [record.message for record in caplog.records]
    assert message == "33 x 47 is painted as 32 x 32: sides are multiples of 16"


IMPORTED_TWICE = """
import miniflux.generate
from miniflux import generate
import miniflux.generate as again
assert callable(generate)
assert callable(again)
"""

NO_WORK = """
import sys, miniflux
assert "torch" not in sys.modules
assert {"load", "generate"} <= set(dir(miniflux))
"""


def test_generate_is_the_function_whatever_was_imported_before():
    module = importlib.import_module("miniflux.generate")
    assert callable(miniflux.generate)
    assert callable(module.generate)
    subprocess.run([sys.executable, "-W", "error", "-c", IMPORTED_TWICE], check=True)


def test_importing_the_package_does_no_work():
    subprocess.run([sys.executable, "-W", "error", "-c", NO_WORK], check=True)


def test_results_are_ordinary_tensors_that_can_be_changed_and_trained_on(flux):
    """Inference tensors, which torch neither changes in place nor trains on, are not returned."""
    generate(flux, "a", output="tensor", **SMALL).mul_(255)
    generate(flux, "a", output="latents", **SMALL).add_(1)
    prompt = encode_prompt(flux, "a", 8)
    z = encode(flux, torch.rand(1, 3, 32, 32))
    for given in (prompt.txt, prompt.pooled, z, decode(flux, z)):
        scale = torch.ones(1, requires_grad=True)
        with torch.enable_grad():
            (given * scale).sum().backward()
        assert torch.isfinite(scale.grad).all()


@pytest.mark.parametrize("fails", [1, 2])
def test_decoding_that_needs_too_much_memory_does_not_cost_the_images(flux, monkeypatch, fails):
    """At first one after the other, then on the CPU. By hand: the first calls fail."""
    z = torch.randn(2, 16, 4, 4)
    expected = decode(flux, z)
    decode_all = type(flux.autoencoder).decode
    calls = []

    def fail_first(self, z):
        calls.append(len(z))
        if len(calls) <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode_all(self, z)

    monkeypatch.setattr(type(flux.autoencoder), "decode", fail_first)
    assert torch.allclose(decode(flux, z), expected, atol=1e-5)
    assert calls == ([2, 1, 1] if fails == 1 else [2, 1, 1, 1])
