"""Edits of scenes: instruction and result. Oracles: by hand on single scenes; what must be left
alike."""

import random
from dataclasses import replace

import numpy as np
import pytest

from miniflux.tiny.world.edits import EDITS, describe, edit, fits, sample_edit
from miniflux.tiny.world.rendering import object_masks, render
from miniflux.tiny.world.scenes import Placed, Scene

SCENE = Scene(
    (Placed("cat", None, 8, 40, 48), Placed("apple", None, 72, 40, 48)),
    "green",
    "a cat left of an apple",
    "pair",
    seed=5,
)


def test_an_edit_says_what_it_does():
    """By hand, with the first possible edit of each kind."""
    done = {}
    for kind in EDITS:
        seed = next(seed for seed in range(99) if edit(SCENE, random.Random(seed), kind))
        done[kind] = edit(SCENE, random.Random(seed), kind)
    instruction, after = done["ground"]
    assert (
        after.ground in instruction and after.ground != "green" and after.objects == SCENE.objects
    )
    instruction, after = done["exchange"]
    (changed,) = set(SCENE.objects) - set(after.objects)
    (new,) = set(after.objects) - set(SCENE.objects)
    assert (
        f"the {changed.name}" in instruction
        and new.name in instruction
        and (new.x, new.y, new.size) == (changed.x, changed.y, changed.size)
    )
    instruction, after = done["remove"]
    (gone,) = set(SCENE.objects) - set(after.objects)
    assert f"the {gone.name}" in instruction and len(after.objects) == 1
    instruction, after = done["add"]
    assert after.objects[:2] == SCENE.objects and after.objects[2].name in instruction
    instruction, after = done["recolour"]
    assert (
        "the apple" in instruction
        and after.objects[1].colour in instruction
        and after.objects[0] == SCENE.objects[0]
    )
    instruction, after = done["resize"]
    (smaller,) = set(after.objects) - set(SCENE.objects)
    assert instruction == f"make the {smaller.name} smaller" and smaller.size == 32
    instruction, after = done["style"]
    assert after.style in instruction and after.objects == SCENE.objects


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_something_that_training_may_show_and_keeps_the_rest(kind):
    for seed in range(25):
        scene, instruction, after = sample_edit(random.Random(seed), kind)
        before, picture = render(scene), render(after)
        assert fits(after) and instruction and (before != picture).any()
        if kind in ("exchange", "remove", "add", "recolour", "resize"):
            touched = set(scene.objects) ^ set(after.objects)
            shown = [
                object_masks(s)[i]
                for s in (scene, after)
                for i, o in enumerate(s.objects)
                if o in touched
            ]
            assert (before == picture)[~np.any(shown, axis=0)].all()


@pytest.mark.parametrize("kind", EDITS)
def test_a_held_out_edit_shows_nothing_that_training_shows(kind):
    for seed in range(5):
        scene, _, after = sample_edit(random.Random(seed), kind, held_out=True)
        assert fits(scene, held_out=True) and fits(after, held_out=True) and scene != after


def test_what_cannot_be_done_is_not_asked_for():
    fish = Scene((Placed("fish", "blue", 30, 30, 60),), "red", "", "single")
    assert not any(
        "blue" in done[0]
        for seed in range(60)
        if (done := edit(fish, random.Random(seed), "recolour"))
    )
    cats = Scene(
        (Placed("cat", None, 2, 40, 50), Placed("cat", None, 70, 40, 50)),
        "blue",
        "two cats",
        "count",
    )
    assert not any(
        edit(cats, random.Random(seed), kind) for seed in range(20) for kind in EDITS
    )  # which cat?


@pytest.mark.parametrize(
    "changes, caption",
    [
        ({}, "a cat and an apple on a green background"),
        (dict(ground="night"), "a cat and an apple at night"),
        (dict(objects=()), "nothing on a green background"),
        (dict(style="pencil sketch"), "a pencil sketch of a cat and an apple"),
        (
            dict(objects=(*SCENE.objects, Placed("car", "blue", 0, 0, 40))),
            "a cat, an apple and a blue car on a green background",
        ),
    ],
)
def test_any_scene_can_be_described(changes, caption):
    assert describe(replace(SCENE, **changes)) == caption
