"""The exact data of the other tasks. Oracles: by hand on single scenes; the facts of a scene."""

import random

import numpy as np

from miniflux import canny
from miniflux.tiny.world.grounds import IMAGE_SIZE
from miniflux.tiny.world.pairs import FAR, NEAR, alike, all_of, depth_map, edges, hole
from miniflux.tiny.world.rendering import object_masks, render
from miniflux.tiny.world.scenes import Placed, Scene, sample_scene

SCENE = Scene(
    (Placed("cat", None, 8, 40, 40), Placed("apple", "red", 70, 30, 56)),
    "blue",
    "a cat left of a red apple",
    "pair",
)


def test_most_holes_cover_one_object_whole_and_all_lie_within_the_picture():
    covered, masks = 0, object_masks(SCENE)
    for seed in range(200):
        mask = hole(SCENE, random.Random(seed))
        assert (
            mask.shape == (IMAGE_SIZE, IMAGE_SIZE)
            and 24 * 24 <= mask.sum() < IMAGE_SIZE * IMAGE_SIZE
        )
        covered += any((mask | ~object_mask).all() for object_mask in masks)
    assert covered >= 150


def test_the_ground_recedes_upwards_and_the_larger_object_is_nearer():
    depth = depth_map(SCENE)
    assert depth.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and (depth[..., 0] == depth[..., 2]).all()
    assert depth[0, 64, 0] == FAR and depth[-1, 64, 0] == NEAR
    cat, apple = (depth[..., 0][mask] for mask in object_masks(SCENE))
    assert len(set(cat)) == len(set(apple)) == 1 and NEAR < cat[0] < apple[0] < 255


def test_what_stands_in_front_is_nearer_though_it_is_smaller():
    scene = Scene(
        (Placed("cat", None, 60, 70, 48), Placed("tree", None, 20, 8, 70)),
        "red",
        "a cat in front of a tree",
        "overlap",
        "in front of",
    )
    cat, tree = (depth_map(scene)[..., 0][mask] for mask in object_masks(scene))
    assert len(set(cat)) == len(set(tree)) == 1 and NEAR < tree[0] < cat[0] < 255


def test_edges_are_those_of_canny_and_lie_about_the_objects():
    picture = render(SCENE)
    found = edges(picture)
    assert np.array_equal(found, np.asarray(canny(picture))) and found.max() == 255
    near = object_masks(SCENE).any(0)
    assert found[near].sum() > 0.9 * found.sum()


def test_every_kind_of_scene_has_all_of_them():
    for seed in range(40):
        scene = sample_scene(random.Random(seed))
        assert (
            hole(scene, random.Random(seed)).any()
            and depth_map(scene).max() > NEAR
            and edges(render(scene)).any()
        )


def test_what_is_alike_shares_the_ground_and_the_style_alone():
    rng, shared = random.Random(1), 0
    for _ in range(60):
        scene = sample_scene(rng)
        other = alike(scene, rng)
        assert (other.ground, other.style) == (scene.ground, scene.style)
        shared += bool({o.name for o in scene.objects} & {o.name for o in other.objects})
    assert shared < 20


def test_all_of_a_scene_is_eight_pictures_for_a_sheet():
    scene = sample_scene(random.Random(5), kind="pair")
    pictures, words = zip(*all_of(scene, random.Random(0)))
    assert (
        [picture.shape for picture in pictures] == [(128, 128, 3)] * 8
        and words[0] == scene.caption
        and len(set(words)) == 8
    )
    assert (
        len(np.unique(pictures[1])) == 3 and (pictures[6][..., 0] == pictures[6][..., 2]).all()
    )  # two objects; grey
    assert pictures[5].std() < pictures[0].std()
