"""What else a scene knows of itself: the hole to fill, the edges to follow, the depths: exact data for every task.

    hole             a box around one of its objects, or anywhere                -> fill
    edges            of the rendered picture, by `canny`                         -> canny, controlnet
    depth_map        the ground recedes upwards, a larger object is nearer       -> depth, controlnet
    blurred, grey    the picture with less in it                                 -> controlnet
    alike            other objects on the same ground, in the same style         -> ip-adapter
"""

import random
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from ..imaging.canny import canny
from .grounds import SIDE
from .scenes import Scene, object_masks, render, sample_scene

FAR, NEAR = 30, 150                                    # brightness of a ground at its upper and at its lower edge


def hole(scene: Scene, rng: random.Random) -> np.ndarray:
    """Where a picture is to be filled: (128, 128) bool. Three times of four one object with some room, whole; else any box."""
    mask = np.zeros((SIDE, SIDE), bool)
    if rng.random() < 0.75:
        placed = rng.choice(scene.objects)
        left, top, right, bottom = placed.x, placed.y, placed.x + placed.size, placed.y + placed.size
        left, top, right, bottom = (edge + sign * rng.randint(2, 12) for edge, sign in ((left, -1), (top, -1), (right, 1), (bottom, 1)))
    else:
        width, height = rng.randint(32, 112), rng.randint(32, 112)
        left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
        right, bottom = left + width, top + height
    mask[max(top, 0):bottom, max(left, 0):right] = True
    return mask


def edges(picture: np.ndarray) -> np.ndarray:
    """(128, 128, 3) uint8 -> white edges on black, the same shape."""
    return np.asarray(canny(picture))


def depth_map(scene: Scene) -> np.ndarray:
    """Grey, near is bright; what stands in front of something is nearest: (128, 128, 3) uint8."""
    depth = np.repeat(np.linspace(FAR, NEAR, SIDE, dtype=np.float32)[:, None], SIDE, axis=1)
    for placed, mask in zip(scene.objects, object_masks(scene)):
        ahead = 40 * (scene.kind == "overlap" and placed == scene.layers[-1])
        depth[mask] = NEAR + (255 - NEAR - 40) * placed.size / SIDE + ahead
    return np.repeat((depth + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(6)))


def grey(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def alike(scene: Scene, rng: random.Random) -> Scene:
    """Other objects on the same ground, in the same style."""
    return replace(sample_scene(rng, ground=scene.ground), style=scene.style)


def all_of(scene: Scene, rng: random.Random) -> list[tuple[np.ndarray, str]]:
    """The scene and all that is known of it, for a sheet: eight pictures (128, 128, 3), each with what it is."""
    picture, masks = render(scene), object_masks(scene)
    shades = np.linspace(255, 100, len(masks), dtype=np.uint8)[:, None, None] * masks               # each object another grey
    return [(picture, scene.caption), (np.repeat(shades.max(0)[..., None], 3, axis=-1), "masks of the objects"),
            (np.where(hole(scene, rng)[..., None], np.uint8(128), picture), "a hole"), (edges(picture), "edges"),
            (depth_map(scene), "depths"), (blurred(picture), "blurred"), (grey(picture), "grey"), (render(alike(scene, rng)), "alike")]
