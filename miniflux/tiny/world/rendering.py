"""From the facts of a scene to pixels.

    render           the image                       object_masks    where each object is seen
    contact_sheet    images with captions, in rows

`miniflux tiny scenes` draws a sheet of them (`sheet.py`).
"""

import textwrap

import numpy as np
from PIL import Image, ImageDraw

from .glyphs import stamp
from .grounds import IMAGE_SIZE, render_ground
from .scenes import Placed, Scene
from .styles import restyle


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: (128, 128, 3) uint8, always the same."""
    image = render_ground(scene.ground, scene.seed)
    for o in scene.layers:
        rgb, alpha = np.split(np.float32(stamp(o.name, o.colour, o.size)), (3,), axis=-1)
        box = image[o.y:o.y + o.size, o.x:o.x + o.size]
        box += alpha / 255 * (rgb - box)
    image = (image.clip(0, 255) + 0.5).astype(np.uint8)
    return restyle(image, scene.style, scene.seed) if scene.style else image


def object_masks(scene: Scene) -> np.ndarray:
    """Where each object is seen, soft edges included: (number of objects, 128, 128) bool."""
    masks: dict[Placed, np.ndarray] = {}
    for o in scene.layers:
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        mask[o.y:o.y + o.size, o.x:o.x + o.size] = stamp(o.name, o.colour, o.size)[..., 3] > 0
        for farther in masks:
            masks[farther] &= ~mask
        masks[o] = mask
    return np.stack([masks[o] for o in scene.objects])


def contact_sheet(images: list[np.ndarray], captions: list[str], columns: int = 8) -> Image.Image:
    """Images in rows, each with its caption printed below."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (IMAGE_SIZE + 8), rows * (IMAGE_SIZE + 44)), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        x = i % columns * (IMAGE_SIZE + 8) + 4
        y = i // columns * (IMAGE_SIZE + 44) + 4
        sheet.paste(Image.fromarray(image), (x, y))
        text = textwrap.fill(caption, 25)
        ImageDraw.Draw(sheet).text((x, y + IMAGE_SIZE + 2), text, fill="black", spacing=1)
    return sheet
