"""The model that ships with the package. Oracles: diffusers with the same folder; an image that was
generated once and looked at; the sprite judge, which does not see the model."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from miniflux import generate, load
from miniflux.checkpoints.hub import SHIPPED
from miniflux.tiny.measure.judge import judge

PROMPT = "a red apple on a blue background"


@pytest.fixture(scope="module")
def flux():
    return load(device="cpu")


def test_the_readmes_picture_is_the_one_that_is_painted(flux):
    (picture,) = generate(flux, PROMPT)
    with Image.open(SHIPPED / "red-apple.png") as golden:
        difference = np.abs(np.int16(golden.convert("RGB")) - np.int16(picture))
    assert (
        difference.max() <= 8 and difference.mean() < 0.1
    )  # other processors round the last bits otherwise


def test_it_is_a_red_apple_on_blue(flux):
    """The judge knows the native glyph, which is a red apple."""
    (verdict,) = judge(np.stack([np.asarray(picture) for picture in generate(flux, PROMPT)]))
    assert (verdict.object, verdict.ground) == ("apple", "blue")


@pytest.mark.parametrize(
    "prompt, keywords, theirs",
    [
        (PROMPT, {}, {}),
        (
            "two owls at night",
            dict(steps=8, guidance=2.0, seed=3),
            dict(num_inference_steps=8, guidance_scale=2.0),
        ),
        (
            "a fox next to a red apple",
            dict(steps=4, true_cfg=2.0, negative_prompt="a cat"),
            dict(num_inference_steps=4, true_cfg_scale=2.0, negative_prompt="a cat"),
        ),
    ],
)
def test_diffusers_loads_the_folder_and_paints_the_same_picture(flux, prompt, keywords, theirs):
    pipeline = FluxPipeline.from_pretrained(SHIPPED / "tiny").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        height=128,
        width=128,
        max_sequence_length=32,
        output_type="pt",
        generator=torch.Generator("cpu").manual_seed(keywords.get("seed", 0)),
        **theirs,
    ).images
    assert (generate(flux, prompt, output="tensor", **keywords) - theirs).abs().max() <= 2e-3


def test_bfloat16_paints_nearly_the_same_picture(flux):
    half = generate(load(device="cpu", dtype=torch.bfloat16), PROMPT, output="tensor")
    error = (half - generate(flux, PROMPT, output="tensor")).square().mean()
    assert 0 < error < 10**-2  # a peak signal-to-noise ratio above 20 dB


def test_guidance_acts(flux):
    """The stronger the guidance, the farther from the unguided picture."""
    weak, middle, strong = (
        generate(flux, PROMPT, guidance=g, output="tensor") for g in (1.0, 2.0, 5.0)
    )
    assert 0 < (weak - middle).square().mean() < (weak - strong).square().mean()


def test_the_shipped_files_are_small():
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40e6 and max(sizes) <= 16e6  # of the whole family
