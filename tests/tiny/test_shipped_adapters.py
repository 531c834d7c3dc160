"""The LoRA and the ControlNet that ship with the package. Oracles: diffusers with the same files; the figures of `evaluate_variant`."""

import random

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from pipelines import difference, mean_of_the_posterior  # noqa: F401

from miniflux import add_lora, canny, generate, load, load_controlnet
from miniflux.checkpoints.hub import SHIPPED, shipped_adapters
from miniflux.tiny.evaluate_variant import measure
from miniflux.tiny.scenes import render, sample_scene

SCENE = sample_scene(random.Random(3), kind="single", held_out=True)
BOTH = dict(prompt=SCENE.caption, width=128, height=128, steps=4, adapt_theirs=lambda pipeline: pipeline.to(torch.float32))


@pytest.fixture(scope="module")
def flux():
    return load(device="cpu")


def test_each_is_found_by_its_name_and_listed():
    assert shipped_adapters() == {"tiny-neon": "--lora", "tiny-controlnet": "--controlnet"}


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
    net, edges = FluxControlNetModel.from_pretrained(SHIPPED / "tiny-controlnet").to(torch.float32), canny(render(SCENE))
    assert difference(generate, FluxControlNetPipeline, SHIPPED / "tiny", {}, parts={"controlnet": net}, **BOTH,
                      ours=dict(controlnet=(load_controlnet("tiny-controlnet", device="cpu"), edges, 0.7, 0.0, 1.0, mode), guidance=7.0),
                      theirs=dict(control_image=edges, control_mode={"canny": 0, "gray": 5}[mode],
                                  controlnet_conditioning_scale=0.7)) <= 2e-3


def test_the_controlnet_makes_the_picture_follow_the_edges(flux):
    figures, _ = measure(flux, "canny", 8, net=load_controlnet("tiny-controlnet", device="cpu"))
    assert figures["edge F1"] > 0.5
