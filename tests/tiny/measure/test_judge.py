"""The judge of tiny pictures. Oracles by hand: scenes whose facts are known, and pictures that show
no object by construction."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from miniflux.tiny.measure.judge import THRESHOLD, judge
from miniflux.tiny.world.glyphs import stamp
from miniflux.tiny.world.grounds import PLAIN, render_ground
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import Placed, Scene, sample_scene
from miniflux.tiny.world.words import RECOLOURABLE


@pytest.fixture(scope="module")
def rendered():
    scenes = [sample_scene(random.Random(100 + i), kind="single", held_out=True) for i in range(20)]
    return np.stack([render(scene) for scene in scenes]), scenes


def paint(name: str, ground: str, x: int = 24, y: int = 20, size: int = 80) -> np.ndarray:
    return render(Scene((Placed(name, None, x, y, size),), ground, "", "single"))


def shuffle(picture: np.ndarray, block: int, rng: random.Random, margin: int = 0) -> np.ndarray:
    """The same blocks in another order; those of the margin stay."""
    corners = [
        (y, x)
        for y in range(margin, 128 - margin, block)
        for x in range(margin, 128 - margin, block)
    ]
    scrambled = picture.copy()
    for (y, x), (v, u) in zip(corners, rng.sample(corners, len(corners))):
        scrambled[y : y + block, x : x + block] = picture[v : v + block, u : u + block]
    return scrambled


def test_the_judge_names_object_and_ground_of_rendered_scenes(rendered):
    """In one of these 20 it finds an object too many: an umbrella in a unicorn's mane."""
    pictures, scenes = rendered
    verdicts = judge(pictures)
    assert sum(len(verdict.found) == 1 for verdict in verdicts) >= 19
    for verdict, scene in zip(verdicts, scenes):
        found, (o,) = verdict.found[0], scene.objects
        assert (found.name, verdict.ground) == (o.name, scene.ground) and verdict.sharp
        assert (
            abs(found.x - o.x - o.size / 2) <= 4
            and abs(found.y - o.y - o.size / 2) <= 4
            and 0.85 < found.size / o.size < 1.18
        )


def test_it_counts_and_places_several_objects():
    """Of 24 true scenes at least 23 are read without a mistake."""
    right = []
    for seed in range(24):
        scene = sample_scene(
            random.Random(seed), kind=("pair", "count", "three")[seed % 3], held_out=True
        )
        (verdict,) = judge(render(scene)[None])
        right.append(
            Counter(f.name for f in verdict.found) == Counter(o.name for o in scene.objects)
        )
        for o in scene.objects:
            assert any(
                f.name == o.name and np.hypot(f.x - o.x - o.size / 2, f.y - o.y - o.size / 2) < 8
                for f in verdict.found
            )
    assert sum(right) >= 23


def test_it_sees_the_colour_of_an_object():
    for seed in range(12):
        scene = sample_scene(random.Random(seed), kind="single", coloured=True, held_out=True)
        (found,) = judge(render(scene)[None])[0].found
        assert (found.name, found.colour or RECOLOURABLE[found.name]) == (
            scene.objects[0].name,
            scene.objects[0].colour,
        )


def test_the_judge_does_not_mind_where_and_how_large_the_object_is():
    for x, y, size in ((4, 4, 72), (52, 50, 72), (18, 18, 93), (70, 74, 50)):
        (verdict,) = judge(paint("fox", "blue", x, y, size)[None])
        assert (verdict.object, verdict.ground) == (
            "fox",
            "blue",
        ) and THRESHOLD < verdict.score <= 1


def test_the_score_is_one_where_picture_and_sprite_are_equal_and_zero_on_a_flat_picture():
    flat = np.full((128, 128, 3), 90, np.uint8)
    same = flat.copy()
    owl = np.float32(stamp("owl", None, 78))
    same[25:103, 25:103] = (owl[..., :3] - 90) * owl[..., 3:] / 255 + 90.5
    assert [round(v.score, 2) for v in judge(np.stack([same, flat]))] == [1, 0]


def test_a_plain_ground_holds_no_sharp_object():
    verdicts = judge(
        np.stack([render_ground(ground, seed=3) for ground in PLAIN]).round().astype(np.uint8)
    )
    assert [(v.ground, v.sharp) for v in verdicts] == [(ground, False) for ground in PLAIN]


def test_scrambled_and_blurred_objects_are_not_sharp(rendered):
    rng = random.Random(0)
    for picture in rendered[0][:5]:
        blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(8)))
        spoilt = (
            shuffle(picture, 16, rng),
            shuffle(picture, 16, rng, margin=16),
            shuffle(picture, 8, rng, margin=16),
            blurred,
        )
        assert not any(v.sharp for v in judge(np.stack(spoilt)))


def test_a_blob_of_the_right_colour_is_not_the_sharp_object():
    y, x = np.mgrid[-64:64, -64:64]
    for name, ground in (
        ("cat", "blue"),
        ("frog", "white"),
        ("rocket", "green"),
        ("bus", "white"),
        ("bee", "pink"),
    ):
        picture = paint(name, ground)
        colour = picture[40:90, 40:90].mean((0, 1))
        picture[:] = picture[0, 0]
        picture[np.hypot(x, y) < 36] = colour
        (verdict,) = judge(picture[None])
        assert verdict.object != name or not verdict.sharp
