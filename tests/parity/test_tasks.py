"""Each image-conditioned task equals its diffusers pipeline: the same small random model, seed and pictures (<= 1e-3).

Diffusers draws from the autoencoder's posterior; here it takes the mean, as miniflux and the original repository do.
"""

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
from pipelines import box_mask, difference, mean_of_the_posterior, picture  # noqa: F401
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
    made = {}

    def folder(in_channels: int = 64, guidance: bool = True):
        if (in_channels, guidance) not in made:
            made[in_channels, guidance] = small_pipeline(tmp_path_factory.mktemp("task") / "flux", guidance, in_channels)
        return made[in_channels, guidance]

    return folder


# ----------------------------------------------------------------------------------------------------- image_to_image


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4, strength=0.6),
    dict(width=64, height=96, steps=3, strength=1.0),
    dict(width=71, height=105, steps=4, strength=0.3, guidance=2.0),
    dict(width=64, height=64, steps=3, strength=0.7, true_cfg=3.0, negative_prompt="a blue cat"),
    dict(width=64, height=64, sigmas=[1.0, 0.8, 0.3, 0.1], strength=0.6),
    dict(width=64, height=64, steps=3, num_images=2, prompt=["a red apple", "an owl at night"]),
], ids=str)
def test_image_to_image(folders, both):
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(), {"image": picture(140, 90)}, **both) < BOUND


def test_image_to_image_of_schnell(folders):
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(guidance=False), {"image": picture(64, 64)}, width=64, height=64,
                      steps=4, strength=0.8) < BOUND


def test_image_to_image_of_one_picture_for_each_prompt(folders):
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(), {"image": [picture(64, 48), picture(64, 48, 1)]},
                      prompt=["a red apple", "an owl"], width=64, height=48, steps=2) < BOUND


def test_image_to_image_of_an_array_in_floating_point(folders):
    array = np.random.default_rng(0).random((64, 48, 3), dtype=np.float32)
    assert difference(image_to_image, FluxImg2ImgPipeline, folders(), {"image": array}, width=48, height=64, steps=2) < BOUND


# ------------------------------------------------------------------------------------------------------------ inpaint


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4, strength=0.6),
    dict(width=64, height=96, steps=3, strength=1.0),
    dict(width=71, height=105, steps=4, strength=0.8),
    dict(width=64, height=64, steps=3, strength=0.7, true_cfg=3.0, negative_prompt="a blue cat"),
    dict(width=64, height=64, steps=3, strength=0.9, num_images=2),
], ids=str)
def test_inpaint(folders, both):
    images = {"image": picture(140, 90), "mask": box_mask(140, 90, (30, 20, 90, 77))}
    assert difference(inpaint, FluxInpaintPipeline, folders(), images, **both) < BOUND


def test_inpaint_with_a_coloured_mask_of_another_size(folders):
    images = {"image": picture(96, 64), "mask": picture(70, 50, 3)}
    assert difference(inpaint, FluxInpaintPipeline, folders(), images, width=96, height=64, steps=3, strength=0.8) < BOUND


@pytest.mark.parametrize("size, box, padding", [
    ((200, 120), (90, 40, 120, 70), 8),                      # well inside
    ((200, 120), (2, 30, 20, 110), 16),                      # at an edge
    ((60, 200), (0, 80, 60, 100), 4),                        # too wide for its shape: the edges are stretched above and below
    ((200, 60), (150, 0, 170, 60), 3),                       # and on both sides
    ((123, 101), (100, 5, 119, 13), 0),
])
def test_inpaint_around_the_mask_paints_what_the_pipeline_paints(folders, size, box, padding):
    images = {"image": picture(*size), "mask": box_mask(*size, box)}
    assert difference(inpaint, FluxInpaintPipeline, folders(), images, width=64, height=64, steps=2, strength=0.9, mask_padding=padding,
                      output="latents") < BOUND


def test_what_is_painted_around_the_mask_lies_where_the_pipeline_puts_it(folders):
    """Within one grey level: the pipeline rounds to bytes before it blends, we after."""
    mask = box_mask(200, 120, (90, 40, 120, 70)).resize((200, 120), Image.Resampling.BILINEAR)
    assert difference(inpaint, FluxInpaintPipeline, folders(), {"image": picture(200, 120), "mask": mask}, width=64, height=64, steps=2,
                      strength=0.9, mask_padding=8, output="pil") <= 1 / 255


# --------------------------------------------------------------------------------------------------------------- fill


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4),
    dict(width=64, height=96, steps=3, strength=0.7),
    dict(width=71, height=105, steps=2, guidance=3.0),
    dict(width=64, height=64, sigmas=[0.9, 0.5]),
    dict(width=64, height=64, steps=2, num_images=2, prompt=["a red apple", "an owl at night"]),
], ids=str)
def test_fill(folders, both):
    images = {"image": picture(140, 90), "mask": box_mask(140, 90, (31, 22, 93, 77))}
    assert difference(fill, FluxFillPipeline, folders(384), images, **both) < BOUND


# ------------------------------------------------------------------------------------------------------------ control


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=4),
    dict(width=71, height=105, steps=2, guidance=30.0),
    dict(width=64, height=64, steps=2, num_images=2, prompt=["a red apple", "an owl at night"]),
], ids=str)
def test_control(folders, both):
    assert difference(control, FluxControlPipeline, folders(128), {"control_image": picture(140, 90)}, **both) < BOUND


@pytest.mark.parametrize("both", [dict(width=96, height=64, steps=4, strength=0.6), dict(width=64, height=80, steps=3, strength=0.9)], ids=str)
def test_control_of_a_picture(folders, both):
    images = {"control_image": picture(140, 90), "image": picture(80, 80, 1)}
    assert difference(control, FluxControlImg2ImgPipeline, folders(128), images, **both) < BOUND


@pytest.mark.parametrize("both", [dict(width=96, height=64, steps=4, strength=0.6), dict(width=64, height=80, steps=3, strength=1.0)], ids=str)
def test_control_of_a_part_of_a_picture(folders, both):
    images = {"control_image": picture(140, 90), "image": picture(80, 80, 1), "mask": box_mask(80, 80, (20, 20, 70, 60))}
    assert difference(control, FluxControlInpaintPipeline, folders(128), images, **both) < BOUND


# ------------------------------------------------------------------------------------------------------------ kontext


@pytest.mark.parametrize("both", [
    dict(width=96, height=64, steps=3),
    dict(width=64, height=64, steps=2, true_cfg=2.0, negative_prompt=""),
    dict(width=64, height=96, steps=2, num_images=2),
], ids=str)
def test_kontext_edit_of_a_picture_in_its_own_size(folders, both):
    """The pipeline would scale every size to max_area; with the area of the size it leaves it as it is."""
    assert difference(kontext_edit, FluxKontextPipeline, folders(), {"image": picture(150, 90)}, auto_resize=False,
                      theirs=dict(max_area=both["width"] * both["height"]), **both) < BOUND


def test_kontext_edit_scales_to_max_area_as_the_pipeline_does(folders):
    assert difference(kontext_edit, FluxKontextPipeline, folders(), {"image": picture(80, 64)}, auto_resize=False, width=200, height=100,
                      max_area=64 * 64, steps=2) < BOUND


def test_kontext_edit_of_a_picture_in_the_nearest_of_the_preferred_shapes(tmp_path):
    folder = small_pipeline(tmp_path / "flux", sample_size=1024, layers=(1, 1))
    assert difference(kontext_edit, FluxKontextPipeline, folder, {"image": picture(300, 420)}, width=64, height=48, steps=1,
                      theirs=dict(max_area=64 * 48)) < BOUND


@pytest.mark.parametrize("reference", [None, picture(48, 80, 5)], ids=["the picture itself", "a reference"])
@pytest.mark.parametrize("both", [
    dict(steps=4, strength=0.7),
    dict(steps=2, strength=1.0, true_cfg=2.0, negative_prompt="a blue cat"),
], ids=str)
def test_kontext_inpaint(folders, both, reference):
    images = {"image": picture(100, 70), "mask": box_mask(100, 70, (20, 20, 70, 60)), "reference": reference}
    assert difference(kontext_inpaint, FluxKontextInpaintPipeline, folders(), images, auto_resize=False, **both) < BOUND


def test_kontext_inpaint_around_the_mask(folders):
    images = {"image": picture(96, 64), "mask": box_mask(96, 64, (20, 20, 40, 30))}
    assert difference(kontext_inpaint, FluxKontextInpaintPipeline, folders(), images, auto_resize=False, steps=2, mask_padding=4,
                      output="latents") < BOUND


# -------------------------------------------------------------------------------------------------------------- redux


@pytest.fixture(scope="module")
def redux_models(folders, tmp_path_factory):
    folder = small_redux(tmp_path_factory.mktemp("redux") / "redux")
    return add_redux(load(folders(), device="cpu"), folder), FluxPriorReduxPipeline.from_pretrained(folder), FluxPipeline.from_pretrained(folders())


@pytest.mark.parametrize("images, scales", [([picture(100, 70)], None), ([picture(30, 30), picture(90, 50, 1)], [0.7, 0.3])], ids=["one", "two"])
def test_redux_beside_a_text(redux_models, images, scales):
    """The prior gets the text encoders; its 512 tokens of text are fixed."""
    flux, prior, pipeline = redux_models
    prior.register_modules(text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, text_encoder_2=pipeline.text_encoder_2,
                           tokenizer_2=pipeline.tokenizer_2)
    both = {} if scales is None else dict(prompt_embeds_scale=scales, pooled_prompt_embeds_scale=scales)
    theirs = prior(image=images, prompt=["an owl at night"] * len(images), **both)
    ours = redux_prompt(flux, images, prompt="an owl at night", scales=scales)
    assert ours.txt.shape == (1, 512 + 9, 32)
    assert (ours.txt - theirs.prompt_embeds).abs().max() < 1e-5 and (ours.pooled - theirs.pooled_prompt_embeds).abs().max() < 1e-5


def test_redux_paints_what_the_two_pipelines_paint(redux_models):
    flux, prior, pipeline = redux_models
    prior.register_modules(text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, text_encoder_2=pipeline.text_encoder_2,
                           tokenizer_2=pipeline.tokenizer_2)
    pipeline.set_progress_bar_config(disable=True)
    a = redux(flux, picture(100, 70), width=64, height=48, steps=3, guidance=2.5, seed=5, output="tensor")
    b = pipeline(**prior(image=picture(100, 70), prompt=""), width=64, height=48, num_inference_steps=3, guidance_scale=2.5,
                 generator=torch.Generator("cpu").manual_seed(5), output_type="pt").images
    assert (a - b).abs().max() < BOUND and b.std() > 0.01
