"""The variants that ship with the package. Oracles: diffusers with the same weights; the figures of `evaluate_variant`."""

import random
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline

from miniflux import canny, control, load
from miniflux.flux import SHIPPED
from miniflux.tiny.evaluate_variant import measure
from miniflux.tiny.export import write_mmdit
from miniflux.tiny.scenes import render, sample_scene


@pytest.fixture(scope="module")
def flux():
    return load("tiny-canny", device="cpu")


def test_it_follows_the_edges(flux):
    """Of these eight 0.63, and 0.58 without the edges; of 50 pictures 0.61 and 0.54 (tiny/weights/README.md)."""
    figures, _ = measure(flux, "canny", 8)
    assert figures["edge F1"] > 0.6


def test_diffusers_paints_the_same_picture_with_the_merged_weights(flux, tmp_path):
    """Written as a whole folder in the diffusers layout, which rounds the merged weights to bfloat16."""
    write_mmdit(tmp_path, flux.mmdit)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(SHIPPED / "tiny" / part, tmp_path / part)
    pipeline = FluxControlPipeline.from_pretrained(tmp_path).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scene = sample_scene(random.Random(3), kind="single", held_out=True)
    edges = canny(render(scene))
    with pytest.MonkeyPatch.context() as patch:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        theirs = pipeline(scene.caption, control_image=edges, height=128, width=128, num_inference_steps=8, guidance_scale=3.5,
                          max_sequence_length=32, output_type="pt", generator=torch.Generator("cpu").manual_seed(0)).images
    ours = control(load(tmp_path, device="cpu"), scene.caption, edges, steps=8, output="tensor")
    assert (ours - theirs).abs().max() <= 2e-3
    assert (control(flux, scene.caption, edges, steps=8, output="tensor") - ours).abs().mean() < 0.02


def test_the_prompt_still_decides_what_the_edges_leave_open(flux):
    """One outline, two grounds: the colours differ."""
    edges = canny(render(sample_scene(random.Random(3), kind="single", held_out=True)))
    red, blue = (np.asarray(control(flux, f"a cat on a {colour} background", edges, steps=12)[0], np.float32)[:8].mean((0, 1))
                 for colour in ("red", "blue"))
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
