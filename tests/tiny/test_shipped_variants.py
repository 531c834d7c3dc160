"""The variants and adapters that ship with the package. Oracles: diffusers with the same weights;
the figures of `evaluate_variant`."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxKontextPipeline, FluxPipeline
from PIL import Image
from pipelines import box_mask, difference, mean_of_the_posterior  # noqa: F401

from miniflux import canny, control, fill, generate, kontext_edit, load
from miniflux.tiny import export
from miniflux.tiny.measure.evaluate import held_out_scenes
from miniflux.tiny.measure.evaluate_variant import measure
from miniflux.tiny.measure.judge import judge
from miniflux.tiny.world.pairs import depth_map
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene

SCENE = sample_scene(random.Random(3), kind="single", held_out=True)


@pytest.fixture(scope="module")
def variants():
    """Name -> the variant, loaded once."""
    return cache(lambda name: load(name, device="cpu"))


PICTURE, DEPTHS = Image.fromarray(render(SCENE)), Image.fromarray(depth_map(SCENE))
# Name -> its task, diffusers' pipeline, the pictures it takes, further keywords of both.
TASKS = {
    "tiny-schnell": (generate, FluxPipeline, {}, {}),
    "tiny-fill": (
        fill,
        FluxFillPipeline,
        {"image": PICTURE, "mask": box_mask(128, 128, (20, 30, 110, 120))},
        {},
    ),
    "tiny-canny": (control, FluxControlPipeline, {"control_image": canny(PICTURE)}, {}),
    "tiny-depth": (control, FluxControlPipeline, {"control_image": DEPTHS}, {}),
    "tiny-kontext": (
        kontext_edit,
        FluxKontextPipeline,
        {"image": PICTURE},
        dict(auto_resize=False, max_area=128 * 128),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_diffusers_paints_the_same_picture_with_the_whole_folder(tmp_path, name):
    """As `python -m miniflux.tiny.export` writes it."""
    task, pipeline, images, both = TASKS[name]
    export.main([name, "--output", str(tmp_path / name)])
    assert (
        difference(
            task,
            pipeline,
            tmp_path / name,
            images,
            prompt=SCENE.caption,
            width=128,
            height=128,
            steps=4,
            **both,
            adapt_theirs=lambda pipeline: pipeline.to(torch.float32),
        )
        <= 2e-3
    )


@pytest.mark.parametrize("name", TASKS)
def test_rounding_the_merged_weights_hardly_changes_the_picture(variants, tmp_path, name):
    task, _, images, keywords = TASKS[name]
    export.write_model(tmp_path, variants(name))
    rounded, merged = (
        task(flux, SCENE.caption, **images, **keywords, steps=4, output="tensor", progress=False)
        for flux in (load(tmp_path, device="cpu"), variants(name))
    )
    assert (rounded - merged).abs().mean() < 0.02


def test_an_export_into_a_folder_that_is_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["tiny-canny", "--output", str(tmp_path)])
    assert (
        stop.value.code == 2
        and "exists already" in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )


# ------------------------------------------------------------------------------------------ figures


def test_schnell_paints_in_four_steps_without_guidance(variants):
    """Of these twelve objects ten are right, and all grounds; of 50 pictures 74%
    (tiny/weights/README.md)."""
    scenes, flux, steps = (
        [scene for scene in held_out_scenes(12, 0) if scene.kind == "single"][:12],
        variants("tiny-schnell"),
        [],
    )
    pictures = generate(
        flux,
        [scene.caption for scene in scenes],
        progress=False,
        on_step=lambda step, t, x: steps.append(t),
    )
    verdicts = judge(np.stack([np.asarray(picture) for picture in pictures]))
    assert not flux.mmdit.config.guidance_embed and steps == pytest.approx([1, 0.75, 0.5, 0.25])
    assert (
        sum(verdict.object == scene.objects[0].name for verdict, scene in zip(verdicts, scenes))
        >= 8
    )
    assert all(verdict.ground == scene.ground for verdict, scene in zip(verdicts, scenes))


def test_the_object_asked_for_is_painted_into_the_hole(variants):
    """Of these eight six, of 50 pictures 80%."""
    figures, _ = measure(variants("tiny-fill"), "fill", 8)
    assert figures["object right"] >= 0.6 and figures["grey levels outside the hole"] < 10


def test_what_is_near_is_painted_where_it_is_near(variants):
    """Of these eight 0.71, and 0.61 without the depths; of 50 pictures 0.71 and 0.60
    (tiny/weights/README.md)."""
    figures, _ = measure(variants("tiny-depth"), "depth", 8)
    assert figures["overlap with what is near"] > 0.65


def test_an_instruction_changes_the_background_and_keeps_the_rest(variants):
    """A fox on blue; its middle, which is all fox, hardly changes."""
    (fox,) = generate(load("tiny", device="cpu"), "a fox on a blue background", progress=False)
    (edited,) = kontext_edit(
        variants("tiny-kontext"), "make the background green", fox, progress=False
    )
    before, after = (np.asarray(picture, np.float32) for picture in (fox, edited))
    blue, green = (picture[:8].mean((0, 1)) for picture in (before, after))
    assert (
        blue[2] > blue[1] + 50
        and green[1] > green[2] + 50
        and np.abs(after - before)[60:80, 50:80].mean() < 20
    )


def test_the_edges_are_followed(variants):
    """Of these eight 0.73, and 0.58 without the edges; of 50 pictures 0.70 and 0.54
    (tiny/weights/README.md)."""
    figures, _ = measure(variants("tiny-canny"), "canny", 8)
    assert figures["edge F1"] > 0.65


def test_the_prompt_still_decides_what_the_edges_leave_open(variants):
    """One outline, two grounds: the colours differ."""
    red, blue = (
        np.asarray(
            control(
                variants("tiny-canny"),
                f"a cat on a {colour} background",
                canny(render(SCENE)),
                steps=12,
            )[0],
            np.float32,
        )[:8].mean((0, 1))
        for colour in ("red", "blue")
    )
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
