"""The tiny world: images of 128x128 composed by code, each with a caption that is exactly true.

A scene is one to four emoji glyphs on a plain or scenic ground, perhaps redrawn in a style. Because
code composes it, everything about it is known without labelling. A `Scene` holds these facts,
`rendering.render` makes the image: one world for every task, text to image (caption, image),
filling (masks), editing (scenes that differ in one field), and for judging the images of a model.

About one pair in ten of (object, plain ground colour) never occurs in training, though each object
and each colour does: a model that gets such a pair right has understood the caption instead of
remembering an image.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .captions import OVERLAPS, RELATIONS, canonical_form, name_objects, vary
from .glyphs import COLOURS, HIDDEN_ON
from .grounds import GROUNDS, IMAGE_SIZE, PLAIN, SCENIC
from .styles import COLOURLESS, STYLES
from .words import ALL_OBJECTS, OBJECTS, RECOLOURABLE

GRID = 8                                 # boxes lie on it: equal objects have equal latents
KINDS = dict(                            # kind of scene: (percent, sizes of an object in pixels)
    single=(36, (72, 88)), big=(3, (104,)), small=(3, (40,)), pair=(32, (56,)),
    overlap=(5, (56,)), count=(14, (56,)), three=(4, (56,)), four=(3, (56,)),
)
DIFFERENT = dict(pair=2, overlap=2, three=3, four=4)    # objects of a kind, where it is not one
BEHIND = 88                              # size of the farther object of an overlap
STYLED = 0.12                            # the share of scenes with a style
SCENIC_SHARE = 0.25                      # the share of scenes with a scenic ground
RECOLOURED = 0.6                         # how often an object that can have another colour has one
RECOLOURABLE_WEIGHT = 3                  # how much more often such an object is drawn
ROW = ((32, 64), (96, 64))               # centres (x, y) of objects, in reading order
COLUMN = ((64, 32), (64, 96))
SQUARE = ((32, 32), (96, 32), (32, 96), (96, 96))
TRIANGLES = ((64, 32), (32, 96), (96, 96)), ((32, 32), (96, 32), (64, 96))


@dataclass(frozen=True)
class Placed:
    """One object: its word, a colour of `COLOURS` or None (that of the glyph), its square box."""

    name: str
    colour: str | None
    x: int                               # left edge in pixels
    y: int                               # upper edge
    size: int                            # side of the box; the longer side of the glyph fills it


@dataclass(frozen=True)
class Scene:
    """All facts about one image. In "a cat left of a dog" the cat is `objects[0]`. Boxes overlap in
    the kind "overlap" only."""

    objects: tuple[Placed, ...]
    ground: str                          # in `GROUNDS`
    caption: str
    kind: str                            # in `KINDS`
    relation: str | None = None          # of a pair, in `RELATIONS`; of an overlap, in `OVERLAPS`
    style: str | None = None             # in `STYLES`
    seed: int = 0                        # of the ground's details

    @property
    def layers(self) -> tuple[Placed, ...]:
        """The objects from the farthest to the nearest."""
        return self.objects[::-1] if self.relation == "in front of" else self.objects


def is_held_out(name: str, ground: str) -> bool:
    """Whether training never shows this object on this ground: one pair in ten, plain grounds."""
    index = 3 * ALL_OBJECTS.index(name) + 7 * GROUNDS.index(ground)
    return ground in PLAIN and index % 10 == 0


def is_visible(name: str, colour: str | None, ground: str) -> bool:
    """Whether the object stands out: nothing red on red, no ghost on white."""
    ground_colour = ground if ground in PLAIN else SCENIC[ground][1]
    colour = colour or RECOLOURABLE.get(name)
    if colour:
        return ground_colour != colour
    return ground_colour not in HIDDEN_ON.get(name, "").split()


def sample_scene(rng: random.Random, *, kind: str | None = None, coloured: bool | None = None,
                 ground: str | None = None, canonical: bool = False, held_out: bool = False,
                 objects: Sequence[str] = OBJECTS) -> Scene:
    """Draw a scene.

    kind: one of `KINDS`; None: any, by their percentages.
    coloured: whether its objects have another colour than their glyphs; None: some have.
    ground: one of `GROUNDS`; None: any.
    canonical: the caption in its canonical form, without synonyms.
    held_out: only objects on a ground with which training never shows them, no style, no other
        colour unless it is asked for, and a canonical caption.
    objects: the words to choose from."""
    seed = rng.getrandbits(32)
    kind = kind or rng.choices(tuple(KINDS), [percent for percent, _ in KINDS.values()])[0]
    style = rng.choice(tuple(STYLES)) if not held_out and rng.random() < STYLED else None
    if style in COLOURLESS or held_out and coloured is None:
        coloured = False
    canonical = canonical or held_out
    wanted, chosen, different = ground, [], DIFFERENT.get(kind, 1)
    while len(chosen) < different:       # a ground on which so many objects are allowed
        ground = wanted or _choose_ground(rng, held_out)
        chosen = _choose_objects(rng, objects, ground, different, coloured, held_out)
    relation = _choose_relation(rng, kind)
    centres = _choose_centres(rng, kind, relation)
    phrase = name_objects(rng, chosen, kind, len(centres), relation, canonical)
    if kind == "overlap":
        placed = _overlap(rng, chosen, relation)
    else:
        placed = _place(rng, chosen * len(centres) if kind == "count" else chosen, centres, kind)
    caption = (canonical_form(phrase, ground, style) if canonical
               else vary(rng, phrase, ground, kind, style))
    return Scene(placed, ground, caption, kind, relation, style, seed)


def _choose_ground(rng: random.Random, held_out: bool) -> str:
    plain = held_out or rng.random() >= SCENIC_SHARE
    return rng.choice(tuple(PLAIN if plain else SCENIC))


def _choose_objects(rng: random.Random, objects: Sequence[str], ground: str, n: int,
                    coloured: bool | None, held_out: bool) -> list[tuple[str, str | None]]:
    """Up to `n` different objects with their colours, allowed on this ground."""
    chosen: dict[str, str | None] = {}
    recolourable = [name for name in objects if name in RECOLOURABLE]
    others = [] if coloured else [name for name in objects if name not in RECOLOURABLE]
    names = others + RECOLOURABLE_WEIGHT * recolourable
    for name in rng.sample(names, len(names)):
        recoloured = rng.random() < RECOLOURED if coloured is None else coloured
        colour = rng.choice(tuple(COLOURS)) if recoloured and name in RECOLOURABLE else None
        if is_held_out(name, ground) == held_out and is_visible(name, colour, ground):
            chosen[name] = colour
        if len(chosen) == n:
            break
    return list(chosen.items())


def _choose_relation(rng: random.Random, kind: str) -> str | None:
    if kind == "pair":
        return rng.choice(tuple(RELATIONS))
    return rng.choice(OVERLAPS) if kind == "overlap" else None


def _choose_centres(rng: random.Random, kind: str, relation: str | None) -> tuple:
    """Where the objects of a scene stand, in the order of the caption."""
    if kind == "count":
        return rng.choice((ROW, rng.choice(TRIANGLES), rng.choice(TRIANGLES), SQUARE))
    if kind == "pair":
        upright = relation in ("above", "below") or relation == "and" and rng.random() < 0.3
        swap = relation in ("right of", "below") or relation == "next to" and rng.random() < 0.5
        return (COLUMN if upright else ROW)[::-1 if swap else 1]
    if kind == "three":
        return rng.choice(TRIANGLES)
    return SQUARE if kind == "four" else ((64, 64),)


def _place(rng: random.Random, chosen: list, centres: tuple, kind: str) -> tuple[Placed, ...]:
    """Boxes of one size about the centres, moved a little, each within its quarter, half or whole
    of the image."""
    size = rng.choice(KINDS[kind][1])
    room = {32: (64 - size) / 2, 64: (IMAGE_SIZE - size) / 4, 96: (64 - size) / 2}
    placed = []
    for (name, colour), centre in zip(chosen, centres):
        x, y = (_on_grid(rng, c - size / 2 - room[c], c - size / 2 + room[c]) for c in centre)
        placed.append(Placed(name, colour, x, y, size))
    return tuple(placed)


def _on_grid(rng: random.Random, low: float, high: float) -> int:
    """A multiple of `GRID` between low and high."""
    return GRID * rng.randint(math.ceil(low / GRID), math.floor(high / GRID))


def _overlap(rng: random.Random, chosen: list, relation: str) -> tuple[Placed, ...]:
    """A large object in the upper middle, a smaller one before it at the lower left or right."""
    size, = KINDS["overlap"][1]
    right = rng.random() < 0.5
    near = (rng.choice((56, 64) if right else (8, 16)), rng.choice((64, 72)), size)
    far = (8 if right else 32, rng.choice((0, 8)), BEHIND)
    boxes = (near, far) if relation == "in front of" else (far, near)
    return tuple(Placed(name, colour, *box) for (name, colour), box in zip(chosen, boxes))
