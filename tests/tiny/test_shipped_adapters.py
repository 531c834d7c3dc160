"""The LoRA and the ControlNet that ship with the package. Oracles: diffusers with the same files; the figures of `evaluate_variant`."""

import random

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from pipelines import difference, mean_of_the_posterior  # noqa: F401

from miniflux import add_lora, canny, generate, load, load_controlnet
from miniflux.checkpoints.hub import SHIPPED, shipped_adapters
from miniflux.tiny.evaluate_variant import edge_f1
from miniflux.tiny.pairs import edges
from miniflux.tiny.scenes import render, sample_scene

SCENE = sample_scene(random.Random(3), kind="single", held_out=True)
BOTH = dict(prompt=SCENE.caption, width=128, height=128, steps=4, adapt_theirs=lambda pipeline: pipeline.to(torch.float32))


@pytest.fixture(scope="module")
def flux():
    return load(device="cpu")


def test_each_is_found_by_its_name_and_listed():
    assert shipped_adapters() == {"tiny-neon": "LoRA", "tiny-controlnet": "ControlNet"}


# ---------------------------------------------------------------------------------------------------------------- neon


def test_diffusers_paints_the_same_picture_with_the_lora():
    assert difference(generate, FluxPipeline, SHIPPED / "tiny", {}, **BOTH | dict(
        adapt=lambda flux: add_lora(flux, "tiny-neon"),
        adapt_theirs=lambda pipeline: pipeline.to(torch.float32).load_lora_weights(SHIPPED / "tiny-neon"))) <= 2e-3


def test_neon_darkens_whatever_ground_the_prompt_names(flux):
    """The mean of the border, in grey levels; half of the scale lies between."""
    borders = [np.asarray(generate(model, "a star on a yellow background", progress=False)[0], np.float32)[:8].mean()
               for model in (flux, add_lora(flux, "tiny-neon", scale=0.5), add_lora(flux, "tiny-neon"))]
    assert borders[0] > 120 and borders[2] < 50 and borders[2] < borders[1] < borders[0]


# ---------------------------------------------------------------------------------------------------------- ControlNet


@pytest.mark.parametrize("mode", ["canny", "gray"])
def test_diffusers_paints_the_same_picture_with_the_controlnet(mode):
    net, outlines = FluxControlNetModel.from_pretrained(SHIPPED / "tiny-controlnet").to(torch.float32), canny(render(SCENE))
    assert difference(generate, FluxControlNetPipeline, SHIPPED / "tiny", {}, parts={"controlnet": net}, **BOTH,
                      ours=dict(controlnet=(load_controlnet("tiny-controlnet", device="cpu"), outlines, 0.7, 0.0, 1.0, mode), guidance=7.0),
                      theirs=dict(control_image=outlines, control_mode={"canny": 0, "gray": 5}[mode],
                                  controlnet_conditioning_scale=0.7)) <= 2e-3


def test_the_controlnet_brings_the_picture_nearer_to_the_edges(flux):
    """Of these 24 to 0.60, from 0.55 without it."""
    scenes = [sample_scene(random.Random(seed), kind="single", held_out=True) for seed in range(24)]
    given, captions = [edges(render(scene)) for scene in scenes], [scene.caption for scene in scenes]
    net = load_controlnet("tiny-controlnet", device="cpu")
    with_it, without = (np.mean([edge_f1(edges(np.asarray(picture)), edge) for picture, edge in zip(pictures, given)]) for pictures in (
        generate(flux, captions, controlnet=(net, given, 1.0, 0.0, 1.0, "canny"), progress=False), generate(flux, captions, progress=False)))
    assert with_it > without + 0.03
