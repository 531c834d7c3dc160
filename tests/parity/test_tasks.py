"""Each image-conditioned task equals its diffusers pipeline (<= 1e-3).

Both have the same small random model, seed and images. Diffusers draws from the autoencoder's
posterior; here it takes the mean, as miniflux and the original repository do.
"""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxPriorReduxPipeline,
)
from PIL import Image
from pipelines import box_mask, difference, mean_of_the_posterior, smooth_noise  # noqa: F401
from reference import small_pipeline, small_redux

from miniflux import (
    add_redux,
    control,
    fill,
    image_to_image,
    inpaint,
    kontext_edit,
    kontext_inpaint,
    load,
    redux,
    redux_prompt,
)

BOUND = 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """In-channels -> the folder of a small pipeline."""
    @cache
    def folder(in_channels: int = 64, guidance: bool = True):
        path = tmp_path_factory.mktemp("task") / "flux"
        return small_pipeline(path, guidance, in_channels)

    return folder


# ----------------------------------------------------------------------------------- image_to_image


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4, strength=0.6),
    dict(width=64, height=96, steps=3, strength=1.0),
    dict(width=71, height=105, steps=4, strength=0.3, guidance=2.0),
    dict(width=64, height=64, steps=3, strength=0.7, true_cfg=3.0, negative_prompt="a blue cat"),
    dict(width=64, height=64, sigmas=[1.0, 0.8, 0.3, 0.1], strength=0.6),
    dict(width=64, height=64, steps=3, num_images=2, prompt=["a red apple", "an owl at night"]),
], ids=str)
def test_image_to_image(folders, both):
    images = {"image": smooth_noise(140, 90)}
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(), images, **both) < BOUND


def test_image_to_image_of_schnell(folders):
    folder = folders(guidance=False)
    images = {"image": smooth_noise(64, 64)}
    settings = dict(width=64, height=64, steps=4, strength=0.8)
    assert difference(image_to_image, FluxImg2ImgPipeline, folder, images, **settings) < BOUND


def test_image_to_image_of_one_image_for_each_prompt(folders):
    images = {"image": [smooth_noise(64, 48), smooth_noise(64, 48, 1)]}
    settings = dict(prompt=["a red apple", "an owl"], width=64, height=48, steps=2)
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(), images, **settings) < BOUND


def test_image_to_image_of_an_array_in_floating_point(folders):
    images = {"image": np.random.default_rng(0).random((64, 48, 3), dtype=np.float32)}
    settings = dict(width=48, height=64, steps=2)
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(), images, **settings) < BOUND


# ------------------------------------------------------------------------------------------ inpaint


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4, strength=0.6),
    dict(width=64, height=96, steps=3, strength=1.0),
    dict(width=71, height=105, steps=4, strength=0.8),
    dict(width=64, height=64, steps=3, strength=0.7, true_cfg=3.0, negative_prompt="a blue cat"),
    dict(width=64, height=64, steps=3, strength=0.9, num_images=2),
], ids=str)
def test_inpaint(folders, both):
    images = {"image": smooth_noise(140, 90), "mask": box_mask(140, 90, (30, 20, 90, 77))}
    assert difference(inpaint, FluxInpaintPipeline, folders(), images, **both) < BOUND


def test_inpaint_with_a_coloured_mask_of_another_size(folders):
    images = {"image": smooth_noise(96, 64), "mask": smooth_noise(70, 50, 3)}
    settings = dict(width=96, height=64, steps=3, strength=0.8)
    assert difference(inpaint, FluxInpaintPipeline, folders(), images, **settings) < BOUND


@pytest.mark.parametrize("size, box, padding", [
    ((200, 120), (90, 40, 120, 70), 8),                     # well inside
    ((200, 120), (2, 30, 20, 110), 16),                     # at an edge
    ((60, 200), (0, 80, 60, 100), 4),                       # too wide: stretched above and below
    ((200, 60), (150, 0, 170, 60), 3),                      # too high: stretched on both sides
    ((123, 101), (100, 5, 119, 13), 0),
])
def test_inpainting_around_the_mask_is_that_of_the_pipeline(folders, size, box, padding):
    images = {"image": smooth_noise(*size), "mask": box_mask(*size, box)}
    settings = dict(width=64, height=64, steps=2, strength=0.9, mask_padding=padding)
    got = difference(inpaint, FluxInpaintPipeline, folders(), images, **settings, output="latents")
    assert got < BOUND


def test_the_inpainted_part_is_where_the_pipeline_puts_it(folders):
    """Within one grey level: the pipeline rounds to bytes before it blends, we after."""
    mask = box_mask(200, 120, (90, 40, 120, 70))
    mask = mask.resize((200, 120), Image.Resampling.BILINEAR)
    images = {"image": smooth_noise(200, 120), "mask": mask}
    settings = dict(width=64, height=64, steps=2, strength=0.9, mask_padding=8)
    got = difference(inpaint, FluxInpaintPipeline, folders(), images, **settings, output="pil")
    assert got <= 1 / 255


# --------------------------------------------------------------------------------------------- fill


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4),
    dict(width=64, height=96, steps=3, strength=0.7),
    dict(width=71, height=105, steps=2, guidance=3.0),
    dict(width=64, height=64, sigmas=[0.9, 0.5]),
    dict(width=64, height=64, steps=2, num_images=2, prompt=["a red apple", "an owl at night"]),
], ids=str)
def test_fill(folders, both):
    images = {"image": smooth_noise(140, 90), "mask": box_mask(140, 90, (31, 22, 93, 77))}
    assert difference(fill, FluxFillPipeline, folders(384), images, **both) < BOUND


# ------------------------------------------------------------------------------------------ control


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4),
    dict(width=71, height=105, steps=2, guidance=30.0),
    dict(width=64, height=64, steps=2, num_images=2, prompt=["a red apple", "an owl at night"]),
], ids=str)
def test_control(folders, both):
    images = {"control_image": smooth_noise(140, 90)}
    assert difference(control, FluxControlPipeline, folders(128), images, **both) < BOUND


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4, strength=0.6),
    dict(width=64, height=80, steps=3, strength=0.9),
], ids=str)
def test_control_of_an_image(folders, both):
    images = {"control_image": smooth_noise(140, 90), "image": smooth_noise(80, 80, 1)}
    assert difference(control, FluxControlImg2ImgPipeline, folders(128), images, **both) < BOUND


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4, strength=0.6),
    dict(width=64, height=80, steps=3, strength=1.0),
], ids=str)
def test_control_of_a_part_of_an_image(folders, both):
    images = {
        "control_image": smooth_noise(140, 90),
        "image": smooth_noise(80, 80, 1),
        "mask": box_mask(80, 80, (20, 20, 70, 60)),
    }
    assert difference(control, FluxControlInpaintPipeline, folders(128), images, **both) < BOUND


# ------------------------------------------------------------------------------------------ kontext


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=3),
    dict(width=64, height=64, steps=2, true_cfg=2.0, negative_prompt=""),
    dict(width=64, height=96, steps=2, num_images=2),
], ids=str)
def test_kontext_edit_of_an_image_in_its_own_size(folders, both):
    """The pipeline scales every size to the area max_area; a size of that area stays as it is."""
    images = {"image": smooth_noise(150, 90)}
    theirs = dict(max_area=both["width"] * both["height"])
    got = difference(kontext_edit, FluxKontextPipeline, folders(), images,
                     auto_resize=False, theirs=theirs, **both)
    assert got < BOUND


def test_kontext_edit_scales_to_max_area_as_the_pipeline_does(folders):
    images = {"image": smooth_noise(80, 64)}
    settings = dict(auto_resize=False, width=200, height=100, max_area=64 * 64, steps=2)
    assert difference(kontext_edit, FluxKontextPipeline, folders(), images, **settings) < BOUND


def test_kontext_edit_of_an_image_in_the_nearest_of_the_preferred_shapes(tmp_path):
    folder = small_pipeline(tmp_path / "flux", sample_size=1024, layers=(1, 1))
    images = {"image": smooth_noise(300, 420)}
    got = difference(kontext_edit, FluxKontextPipeline, folder, images,
                     width=64, height=48, steps=1, theirs=dict(max_area=64 * 48))
    assert got < BOUND


@pytest.mark.parametrize("reference", [
    None,
    smooth_noise(48, 80, 5),
], ids=["the image itself", "a reference"])
@pytest.mark.parametrize("both", [
    dict(steps=4, strength=0.7),
    dict(steps=2, strength=1.0, true_cfg=2.0, negative_prompt="a blue cat"),
], ids=str)
def test_kontext_inpaint(folders, both, reference):
    images = {
        "image": smooth_noise(100, 70),
        "mask": box_mask(100, 70, (20, 20, 70, 60)),
        "reference": reference,
    }
    got = difference(kontext_inpaint, FluxKontextInpaintPipeline, folders(), images,
                     auto_resize=False, **both)
    assert got < BOUND


def test_kontext_inpaint_around_the_mask(folders):
    images = {"image": smooth_noise(96, 64), "mask": box_mask(96, 64, (20, 20, 40, 30))}
    got = difference(kontext_inpaint, FluxKontextInpaintPipeline, folders(), images,
                     auto_resize=False, steps=2, mask_padding=4, output="latents")
    assert got < BOUND


# -------------------------------------------------------------------------------------------- redux


@pytest.fixture(scope="module")
def redux_models(folders, tmp_path_factory):
    """Our model with Redux; their two pipelines, the prior with the text encoders."""
    folder = small_redux(tmp_path_factory.mktemp("redux") / "redux")
    flux = add_redux(load(folders(), device="cpu"), folder)
    prior = FluxPriorReduxPipeline.from_pretrained(folder)
    pipeline = FluxPipeline.from_pretrained(folders())
    pipeline.set_progress_bar_config(disable=True)
    prior.register_modules(
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        text_encoder_2=pipeline.text_encoder_2,
        tokenizer_2=pipeline.tokenizer_2,
    )
    return flux, prior, pipeline


@pytest.mark.parametrize("images, scales", [
    ([smooth_noise(100, 70)], None),
    ([smooth_noise(30, 30), smooth_noise(90, 50, 1)], [0.7, 0.3]),
], ids=["one", "two"])
def test_redux_with_a_text(redux_models, images, scales):
    """The prior always has 512 tokens of text."""
    flux, prior, _ = redux_models
    both = {}
    if scales is not None:
        both = dict(prompt_embeds_scale=scales, pooled_prompt_embeds_scale=scales)
    theirs = prior(image=images, prompt=["an owl at night"] * len(images), **both)
    ours = redux_prompt(flux, images, prompt="an owl at night", scales=scales)
    assert ours.txt.shape == (1, 512 + 9, 32)
    assert (ours.txt - theirs.prompt_embeds).abs().max() < 1e-5
    assert (ours.pooled - theirs.pooled_prompt_embeds).abs().max() < 1e-5


def test_redux_is_the_two_pipelines(redux_models):
    flux, prior, pipeline = redux_models
    image = smooth_noise(100, 70)
    a = redux(flux, image, width=64, height=48, steps=3, guidance=2.5, seed=5, output="tensor")
    b = pipeline(
        **prior(image=image, prompt=""),
        width=64,
        height=48,
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="pt",
    ).images
    assert (a - b).abs().max() < BOUND
    assert b.std() > 0.01
