"""The whole task equals diffusers' FluxPipeline (<= 1e-3).

Both have the same small random model and the same seed."""

import pytest
import torch
from diffusers import FluxPipeline

from miniflux import generate, load

BOUND = 1e-3
# Our keywords -> theirs.
NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "num_images": "num_images_per_prompt",
}
OUTPUTS = {"tensor": "pt", "latents": "latent"}


@pytest.fixture(scope="module")
def models(small_folder):
    pipeline = FluxPipeline.from_pretrained(small_folder)
    pipeline.set_progress_bar_config(disable=True)
    return load(small_folder, device="cpu"), pipeline


def difference(
    models, prompt="a red apple", seeds=(7,), ours=None, theirs=None, output="tensor", **both
) -> float:
    """The largest difference of the images, or of the latents.

    ours, theirs: keywords of one of them.
    both:         keywords of both under our names."""
    flux, pipeline = models
    tokens = min(flux.config.max_text_tokens, 40)
    a = generate(flux, prompt, seed=seeds[0], max_text_tokens=tokens, output=output,
                 **both, **(ours or {}))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    b = pipeline(
        prompt,
        generator=generators if len(seeds) > 1 else generators[0],
        max_sequence_length=tokens,
        output_type=OUTPUTS[output],
        **{NAMES.get(name, name): value for name, value in both.items()},
        **(theirs or {}),
    ).images
    if output == "latents":
        factor = pipeline.vae_scale_factor
        b = pipeline._unpack_latents(b, both["height"], both["width"], factor)
    assert a.shape == b.shape
    assert b.std() > 0.01
    return float((a - b).abs().max())


def test_an_image_equals_the_pipelines(models):
    assert difference(models, width=96, height=64, steps=4) < BOUND


def test_guidance_and_another_shape_equal_the_pipelines(models):
    settings = dict(width=64, height=112, steps=3, guidance=7.5)
    assert difference(models, prompt="an owl at night", **settings) < BOUND


def test_true_cfg_equals_the_pipelines(models):
    settings = dict(width=64, height=96, steps=3, true_cfg=3.0)
    assert difference(models, **settings, negative_prompt="a blue cat") < BOUND


def test_true_cfg_with_an_empty_negative_prompt_is_active_as_in_the_pipeline(models):
    settings = dict(width=64, height=64, steps=2, true_cfg=2.0)
    assert difference(models, **settings, negative_prompt="") < BOUND


def test_own_sigmas_pass_through_the_shift_as_in_the_pipeline(models):
    assert difference(models, width=64, height=96, sigmas=[1.0, 0.7, 0.2]) < BOUND


def test_a_batch_with_a_seed_for_each_image_equals_the_pipelines(models):
    prompts = ["a red apple", "two blue cats"]
    settings = dict(width=64, height=64, steps=3, num_images=2)
    assert difference(models, prompt=prompts, seeds=(5, 6, 7, 8), **settings) < BOUND


def test_a_size_that_is_no_multiple_of_16_is_rounded_as_in_the_pipeline(models):
    assert difference(models, width=71, height=105, steps=2) < BOUND


def test_a_large_image_has_the_pipelines_latents(models):
    assert difference(models, width=1360, height=768, steps=2, output="latents") < BOUND
