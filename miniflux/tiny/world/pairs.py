"""The exact data of a scene for the other tasks.

    hole             a box around one of its objects, or anywhere             fill
    edges            of the rendered image, by `canny`                        canny, controlnet
    depth_map        the ground recedes upwards, a larger object is nearer    depth, controlnet
    blurred, grey    the image with less in it                                controlnet
    alike            other objects on the same ground, in the same style      ip-adapter
"""

import random
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from ...imaging.canny import canny
from .grounds import IMAGE_SIZE
from .rendering import object_masks, render
from .scenes import Scene, sample_scene

FAR, NEAR = 30, 150                      # brightness of a ground at its upper and at its lower edge


def hole(scene: Scene, rng: random.Random) -> np.ndarray:
    """The part of an image to be filled: (128, 128) bool. Three times of four one whole object with
    some room; else any box."""
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    if rng.random() < 0.75:
        o = rng.choice(scene.objects)
        left, top = o.x - rng.randint(2, 12), o.y - rng.randint(2, 12)
        right, bottom = o.x + o.size + rng.randint(2, 12), o.y + o.size + rng.randint(2, 12)
    else:
        width, height = rng.randint(32, 112), rng.randint(32, 112)
        left, top = rng.randint(0, IMAGE_SIZE - width), rng.randint(0, IMAGE_SIZE - height)
        right, bottom = left + width, top + height
    mask[max(top, 0):bottom, max(left, 0):right] = True
    return mask


def edges(image: np.ndarray) -> np.ndarray:
    """(128, 128, 3) uint8 -> white edges on black, the same shape."""
    return np.asarray(canny(image))


def depth_map(scene: Scene) -> np.ndarray:
    """Grey, near is bright; an object in front of another is nearest: (128, 128, 3) uint8."""
    column = np.linspace(FAR, NEAR, IMAGE_SIZE, dtype=np.float32)[:, None]
    depth = np.repeat(column, IMAGE_SIZE, axis=1)
    for o, mask in zip(scene.objects, object_masks(scene)):
        ahead = 40 * (scene.kind == "overlap" and o == scene.layers[-1])
        depth[mask] = NEAR + (255 - NEAR - 40) * o.size / IMAGE_SIZE + ahead
    return np.repeat((depth + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(6)))


def grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def alike(scene: Scene, rng: random.Random) -> Scene:
    """Other objects on the same ground, in the same style."""
    return replace(sample_scene(rng, ground=scene.ground), style=scene.style)


def all_of(scene: Scene, rng: random.Random) -> list[tuple[np.ndarray, str]]:
    """The scene and all its data, for a sheet: eight images (128, 128, 3), each with its name."""
    image, masks = render(scene), object_masks(scene)
    shades = np.linspace(255, 100, len(masks), dtype=np.uint8)[:, None, None] * masks
    holed = np.where(hole(scene, rng)[..., None], np.uint8(128), image)
    return [(image, scene.caption),
            (np.repeat(shades.max(0)[..., None], 3, axis=-1), "masks of the objects"),
            (holed, "a hole"), (edges(image), "edges"), (depth_map(scene), "depths"),
            (blurred(image), "blurred"), (grey(image), "grey"),
            (render(alike(scene, rng)), "alike")]
