"""The image-conditioned tasks without the references: identities, sizes, mistakes.
Oracle: by hand; parity is in tests/parity."""

import copy
import importlib
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import small_pipeline, small_redux
from samples import SHARED

from miniflux import (
    add_redux,
    control,
    expand_canvas,
    fill,
    generate,
    image_to_image,
    inpaint,
    kontext_edit,
    kontext_inpaint,
    load,
    redux,
    redux_prompt,
)
from miniflux.imaging.images import preprocess
from miniflux.kontext_edit import PREFERRED, reference_size
from miniflux.latents import encode

SMALL = dict(steps=2, max_text_tokens=8, progress=False)


def noise_image(seed: int, width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Input channels -> a small random model."""
    path = tmp_path_factory.mktemp("tasks")
    models = {}
    for channels in (64, 128, 384):
        folder = small_pipeline(path / f"flux{channels}", in_channels=channels)
        models[channels] = load(folder, device="cpu")
    return models


@pytest.fixture(scope="module")
def flux(models):
    return models[64]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return noise_image(0, 64, 48)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (16, 8, 40, 32))
    return mask


ALL = {
    "image_to_image": (64, lambda flux, p, m, **k: image_to_image(flux, "an owl", p, **k)),
    "inpaint": (64, lambda flux, p, m, **k: inpaint(flux, "an owl", p, m, **k)),
    "fill": (384, lambda flux, p, m, **k: fill(flux, "an owl", p, m, **k)),
    "control": (128, lambda flux, p, m, **k: control(flux, "an owl", p, **k)),
    "kontext_edit": (64, lambda flux, p, m, **k: kontext_edit(flux, "an owl", p, **k)),
    "kontext_inpaint": (64, lambda flux, p, m, **k: kontext_inpaint(flux, "an owl", p, m, **k)),
}


@pytest.mark.parametrize("task", ALL)
def test_a_batch_equals_its_singles(models, picture, mask, task):
    channels, paint = ALL[task]
    keywords = SMALL | dict(width=64, height=48, output="tensor")
    flux = models[channels]
    batch = paint(flux, picture, mask, num_images=2, seed=5, **keywords)
    singles = [paint(flux, picture, mask, seed=seed, **keywords) for seed in (5, 6)]
    assert torch.allclose(batch, torch.cat(singles), atol=1e-4)
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)


@pytest.mark.parametrize("task", ALL)
def test_true_cfg_of_one_and_an_unchanged_seed_change_nothing(models, picture, mask, task):
    channels, paint = ALL[task]
    keywords = SMALL | dict(width=64, height=48, output="latents")
    with_cfg = keywords | dict(negative_prompt="a cat", true_cfg=1.0)
    expected = paint(models[channels], picture, mask, **keywords)
    assert torch.equal(paint(models[channels], picture, mask, **with_cfg), expected)


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("wanted", [64, 128, 384])
def test_a_model_of_another_task_is_refused_with_the_name_of_the_right_one(
        models, picture, mask, task, wanted):
    channels, paint = ALL[task]
    if wanted != channels:
        sentence = (f"{task} needs a transformer with {channels} input channels, "
                    "as that of the model")
        with pytest.raises(ValueError, match=sentence):
            paint(models[wanted], picture, mask, **SMALL)


def test_generate_refuses_it_too(models):
    sentence = ("generate needs a transformer with 64 input channels, "
                "as that of the model dev; .* has 384")
    with pytest.raises(ValueError, match=sentence):
        generate(models[384], "an owl", **SMALL)


@pytest.mark.parametrize("task", ALL)
def test_no_network_runs_twice_for_the_same_input(models, picture, mask, task):
    channels, paint = ALL[task]
    flux = models[channels]
    seen = []

    def look(network, inputs, output):
        seen.append((type(network), inputs[0].double().sum().item()))

    networks = (flux.autoencoder.encoder, flux.clip, flux.t5)
    hooks = [network.register_forward_hook(look) for network in networks]
    paint(flux, picture, mask, width=64, height=48, **SMALL)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(set(seen)) == 3     # the image, and the prompt by two encoders


@pytest.mark.parametrize("task", ALL)
def test_bfloat16_costs_a_task_no_more_than_it_costs_generate(models, picture, mask, task):
    """Measured: 12% to 14% of the latents of these random models for either,
    most of it from the rounding of 1000·t."""
    def distance(flux, paint) -> float:
        rounded = {}
        for part in ("clip", "t5", "mmdit", "autoencoder"):
            rounded[part] = copy.deepcopy(getattr(flux, part)).bfloat16()
        keywords = SMALL | dict(width=64, height=48, output="latents", guidance=1.0)
        got = paint(replace(flux, **rounded), **keywords)
        exact = paint(flux, **keywords)
        return ((got - exact).norm() / exact.norm()).item()

    channels, paint = ALL[task]
    plain = distance(models[64], lambda flux, **k: generate(flux, "an owl", **k))
    ours = distance(models[channels], lambda flux, **k: paint(flux, picture, mask, **k))
    assert 0 < ours < 1.5 * plain


# --------------------------------------------------------------------------- identities


def test_at_a_small_strength_little_changes(flux, picture):
    z = encode(flux, preprocess([picture], 64, 48))
    changes = []
    for strength in (0.02, 0.5, 1.0):
        keywords = SMALL | dict(strength=strength, steps=50, guidance=0.0)
        result = image_to_image(flux, "an owl", picture, width=64, height=48, output="latents",
                                **keywords)
        changes.append((result - z).square().mean())
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("paint", [inpaint, kontext_inpaint], ids=["inpaint", "kontext_inpaint"])
def test_outside_the_mask_the_latents_arrive_where_they_were(flux, picture, mask, paint):
    result = paint(flux, "an owl", picture, mask, strength=1.0, width=64, height=48,
                   output="latents", **SMALL)
    z = encode(flux, preprocess([picture], 64, 48))
    inside = torch.zeros(6, 8, dtype=bool)
    inside[1:4, 2:5] = True
    assert torch.allclose(result[..., ~inside], z[..., ~inside], atol=1e-5)
    assert not torch.allclose(result[..., inside], z[..., inside], atol=0.1)


def test_a_white_mask_makes_inpaint_image_to_image(flux, picture):
    keywords = SMALL | dict(width=64, height=48, output="latents")
    white = Image.new("L", (64, 48), 255)
    expected = image_to_image(flux, "an owl", picture, **keywords)
    assert torch.equal(inpaint(flux, "an owl", picture, white, **keywords), expected)


def test_image_to_image_at_strength_one_is_generate(flux, picture):
    keywords = SMALL | dict(width=64, height=48, output="latents", guidance=3.5)
    result = image_to_image(flux, "an owl", picture, strength=1.0, **keywords)
    assert torch.equal(result, generate(flux, "an owl", **keywords))


def test_pasting_back_keeps_every_pixel_outside_the_mask(models, picture, mask):
    keywords = SMALL | dict(paste_back=True)
    outside = np.asarray(mask) == 0
    before = np.asarray(picture)
    for size in ({}, dict(width=64, height=48)):
        painted, = fill(models[384], "an owl", picture, mask, **size, **keywords)
        assert painted.size == (64, 48)
        after = np.asarray(painted)
        assert np.array_equal(after[outside], before[outside])
        assert not np.array_equal(after[~outside], before[~outside])
    tensor = fill(models[384], "an owl", picture, mask, width=64, height=48, output="tensor",
                  **keywords)
    pixels = (tensor[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(pixels, after)


def test_painting_around_the_mask_keeps_the_rest_and_the_size(flux):
    photo = noise_image(1, 200, 96)
    before = np.asarray(photo)
    hole = Image.new("L", photo.size)
    hole.paste(255, (100, 40, 140, 70))
    outside = np.asarray(hole) == 0
    for paint in (inpaint, kontext_inpaint):
        painted, = paint(flux, "an owl", photo, hole, mask_padding=8, width=64, height=64, **SMALL)
        after = np.asarray(painted)
        assert painted.size == photo.size
        assert np.array_equal(after[outside], before[outside])
        assert not np.array_equal(after[~outside], before[~outside])


def test_outpainting_fills_what_expand_canvas_adds(models, picture):
    canvas, mask = expand_canvas(picture, right=32)
    painted, = fill(models[384], "a meadow", canvas, mask, paste_back=True, **SMALL)
    assert painted.size == (96, 48)
    assert np.array_equal(np.asarray(painted)[:, :64], np.asarray(picture))


# -------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("task", ALL)
def test_the_result_has_the_images_shape_at_the_models_number_of_pixels(models, task):
    """The small model's square is 32 x 32."""
    channels, paint = ALL[task]
    photo = Image.new("RGB", (400, 100))
    hole = Image.new("L", (400, 100), 255)
    expected = (64, 16)
    if "kontext" in task:
        expected = reference_size(models[64], (400, 100), True)

    def painted_size(**size):
        return paint(models[channels], photo, hole, **size, **SMALL)[0].size

    assert painted_size() == expected
    assert painted_size(width=32)[0] == 32
    assert painted_size(width=32, height=48) == (32, 48)


@pytest.mark.parametrize("size, expected", [
    ((1000, 1000), (1024, 1024)),
    ((4000, 3000), (1184, 880)),
    ((300, 3000), (672, 1568)),
    ((1360, 768), (1392, 752)),
    ((8, 9), (1024, 1024)),
])
def test_kontext_gets_one_of_seventeen_shapes(flux, size, expected):
    full = replace(flux, config=replace(flux.config, size=1024))
    assert len(set(PREFERRED)) == 17
    assert reference_size(full, size, True) == expected
    assert reference_size(full, size, False) == tuple(max(n // 16 * 16, 16) for n in size)


def test_kontext_generates_exactly_the_size_that_is_asked_for(flux, picture):
    keywords = SMALL | dict(width=80, height=32)
    edited, = kontext_edit(flux, "an owl", picture, **keywords)
    assert edited.size == (80, 32)
    edited, = kontext_edit(flux, "an owl", picture, max_area=64 * 64, **keywords)
    assert edited.size == (96, 32)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the images are beside the repository")
def test_real_images_with_a_mask_of_another_size(models, caplog):
    paths = SHARED / "robot.webp", SHARED / "cup_mask.png"
    with caplog.at_level(logging.WARNING):
        painted, = fill(models[384], "a cup", *paths, paste_back=True, **SMALL)
    assert [record.message for record in caplog.records] == [
        "the mask of 1232 x 1632 is resized to the image's 840 x 840"]
    assert painted.size == (840, 840)
    robot, mask = (Image.open(path) for path in paths)
    mask = mask.convert("L").resize((840, 840), Image.Resampling.LANCZOS)
    outside = np.asarray(mask) < 128
    before = np.asarray(robot.convert("RGB"))
    assert np.array_equal(np.asarray(painted)[outside], before[outside])


# -------------------------------------------------------------------------------- redux


@pytest.fixture(scope="module")
def redux_folder(tmp_path_factory):
    return small_redux(tmp_path_factory.mktemp("redux") / "redux")


def test_a_redux_prompt_serves_every_task(flux, redux_folder, picture):
    with_redux = add_redux(flux, redux_folder)
    prompt = redux_prompt(with_redux, picture, prompt="an owl", max_text_tokens=8)
    assert prompt.txt.shape == (1, 8 + 9, 32)
    assert image_to_image(flux, prompt, picture, **SMALL)[0].size == (32, 16)
    assert redux(with_redux, picture, prompt="an owl", **SMALL)[0].size == (32, 32)


def test_several_images_are_weighted_and_none_is_left_out(flux, redux_folder, picture):
    """By hand: the sum of the single prompts; by default the mean.
    Without a text its tokens are zeros."""
    with_redux = add_redux(flux, redux_folder)
    other = Image.new("RGB", (20, 90), (200, 10, 90))

    def prompt_of(images, **keywords):
        return redux_prompt(with_redux, images, prompt=None, max_text_tokens=4, **keywords)

    a = prompt_of(picture)
    b = prompt_of(other)
    assert not a.txt[:, :4].any()
    assert not a.pooled.any()
    mixed = prompt_of([picture, other], scales=[0.7, 0.3])
    assert torch.allclose(mixed.txt, 0.7 * a.txt + 0.3 * b.txt, atol=1e-5)
    mean = prompt_of([picture, other])
    assert torch.allclose(mean.txt, (a.txt + b.txt) / 2, atol=1e-5)


@pytest.mark.parametrize("keywords, sentence", [
    (dict(scales=[1.0, 2.0]), "there are 2 scales for 1 images"),
    (dict(scales=float("nan")), "each of the scales is nan"),
    (dict(prompt=["a", "b"]), "redux takes one prompt for all its images, got 2"),
    (dict(max_text_tokens=0), "max_text_tokens is 0"),
    (dict(prompt=None, max_text_tokens=10**6), "max_text_tokens is 1000000"),
])
def test_redux_answers_a_mistake_in_one_sentence(flux, redux_folder, picture, keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        redux(add_redux(flux, redux_folder), picture, **(SMALL | keywords))


def test_a_model_without_redux_is_refused_with_the_way_to_add_it(flux, picture):
    with pytest.raises(ValueError, match="has no Redux: load.*add_redux"):
        redux(flux, picture, **SMALL)


# ----------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("task, keywords, sentence", [
    ("image_to_image", dict(strength=0), "strength is 0: expected a number from 0.001 to 1"),
    ("inpaint", dict(strength=1.5), "strength is 1.5"),
    ("fill", dict(strength="much"), "strength is 'much'"),
    ("inpaint", dict(mask_padding=2.5), "mask_padding is 2.5"),
    ("control", dict(mask="m.png"), "there is a mask but no image"),
    ("kontext_edit", dict(max_area=3), "max_area is 3"),
    ("kontext_edit", dict(width=8), "width is 8: expected a whole number of pixels from 16"),
    ("kontext_inpaint", dict(height="64"), "height is '64'"),
    ("image_to_image", dict(width=0), "width is 0"),
    ("kontext_inpaint", dict(reference="missing.png"), "the reference missing.png does not exist"),
])
def test_a_value_out_of_range_gets_one_sentence(models, picture, mask, task, keywords, sentence):
    channels, paint = ALL[task]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        paint(models[channels], picture, mask, **(SMALL | keywords))


def test_images_that_are_missing_or_do_not_match_get_one_sentence(models, picture):
    with pytest.raises(ValueError, match="the control image is a NoneType"):
        control(models[128], "an owl", None, **SMALL)
    unlike = [Image.new("RGB", (64, 64)), Image.new("RGB", (32, 48))]
    sentence = "the images of one call must have one size, got 32 x 48, 64 x 64"
    with pytest.raises(ValueError, match=sentence):
        kontext_edit(models[64], "an owl", unlike, **SMALL)
    with pytest.raises(ValueError, match="3 images are given for 2 to paint"):
        image_to_image(models[64], ["an owl", "a cat"], [picture] * 3, **SMALL)
    with pytest.raises(ValueError, match="the mask is empty"):
        fill(models[384], "an owl", picture, Image.new("L", (64, 48)), **SMALL)


def test_every_task_is_the_function_whatever_was_imported_before():
    import miniflux
    modules = {"canny": "imaging.canny", "redux": "redux"} | {task: task for task in ALL}
    for name, module in modules.items():
        importlib.import_module(f"miniflux.{module}")
        assert callable(getattr(miniflux, name))
        assert getattr(miniflux, name).__module__ == f"miniflux.{module}"
