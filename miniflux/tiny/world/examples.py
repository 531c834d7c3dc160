"""Forty-eight true scenes that ship with the package: image, caption, and where each object is.

    >>> example = examples("pair")[0]
    >>> example.caption, example.objects
    ('a balloon below a car on a cyan background', ('balloon', 'car'))
    >>> example.image.shape, example.masks.shape
    (torch.Size([3, 128, 128]), torch.Size([2, 128, 128]))

Drawing scenes needs the emoji font; these need nothing, so that the course runs everywhere. They
are two sheets of 8 x 6 tiles: `images.webp`, and `masks.png` with the first object in red and the
second in green. After a change of the world they are written again by `python -m
miniflux.tiny.world.examples`. """

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...command import command
from .grounds import IMAGE_SIZE, PLAIN
from .rendering import object_masks, render
from .scenes import Scene, sample_scene

FOLDER = Path(__file__).parent / "examples_data"
COUNT, COLUMNS = 24, 8     # scenes of each kind; tiles in a row
KINDS = "pair", "single"


@dataclass(frozen=True)
class Example:
    """One true scene."""

    caption: str
    objects: tuple[str, ...]       # their words in the caption, in its order
    image: Tensor                  # (3, 128, 128) in [0, 1]
    masks: Tensor                  # (objects, 128, 128) bool: where each is seen


@lru_cache
def examples(kind: str) -> tuple[Example, ...]:
    """The 24 shipped scenes of a kind: "pair" for two different objects, "single" for one.

    Pairs on any ground, single objects on plain ones; no styles, no unusual colours, captions in
    their canonical form."""
    if kind not in KINDS:
        raise ValueError(f"there are no examples of the kind {kind!r}: expected one of {KINDS}")
    images, masks = (tiles(FOLDER / name) for name in ("images.webp", "masks.png"))
    found = []
    for i, fact in enumerate(json.loads((FOLDER / "captions.json").read_text("utf-8"))):
        if fact["kind"] == kind:
            objects = tuple(fact["objects"])
            found.append(Example(fact["caption"], objects, images[i].float() / 255,
                                 masks[i, :len(objects)] > 127))
    return tuple(found)


def tiles(path: Path) -> Tensor:
    """A sheet as its tiles: (48, 3, 128, 128) uint8."""
    whole = torch.from_numpy(np.array(Image.open(path).convert("RGB")))         # (768, 1024, 3)
    whole = whole.unflatten(0, (-1, IMAGE_SIZE))                            # (6, 128, 1024, 3)
    whole = whole.unflatten(2, (-1, IMAGE_SIZE))                            # (6, 128, 8, 128, 3)
    return whole.permute(0, 2, 4, 1, 3).flatten(0, 1)


def sheet(images: list[np.ndarray]) -> Image.Image:
    """Tiles (128, 128, 3) uint8 as one image, eight in a row."""
    rows = [np.concatenate(images[i:i + COLUMNS], 1) for i in range(0, len(images), COLUMNS)]
    return Image.fromarray(np.concatenate(rows))


def scenes() -> list[Scene]:
    """The scenes of which the sheets are made."""
    rng, found = random.Random(5), []
    for kind in KINDS:
        chosen = 0
        while chosen < COUNT:
            scene = sample_scene(rng, kind=kind, coloured=False, canonical=True)
            if scene.style is None and (kind == "pair" or scene.ground in PLAIN):
                found.append(scene)
                chosen += 1
    return found


def mask_tile(scene: Scene) -> np.ndarray:
    tile = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for channel, mask in enumerate(object_masks(scene)):
        tile[..., channel] = 255 * mask
    return tile


@command
def main() -> None:
    """Draw the scenes again; needs the emoji font."""
    made = scenes()
    sheet([render(scene) for scene in made]).save(FOLDER / "images.webp", lossless=True, method=6)
    sheet([mask_tile(scene) for scene in made]).save(FOLDER / "masks.png", optimize=True)
    facts = [{"kind": scene.kind, "caption": scene.caption,
              "objects": [placed.name for placed in scene.objects]} for scene in made]
    lines = ",\n".join(json.dumps(fact) for fact in facts)
    (FOLDER / "captions.json").write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
