"""The tiny world: pictures of 128x128 composed by code, each with a caption that is exactly true.

A scene is one to four emoji glyphs on a plain or scenic ground, perhaps redrawn in a style. Because code composes it, everything
about it is known without labelling. A `Scene` holds these facts, `render` paints them, `object_masks` outlines them: one world for
every task, text to image (caption, picture), filling (masks), editing (scenes that differ in one field), and for judging what a
model paints.

    >>> scene = sample_scene(random.Random(3))
    >>> scene.caption, scene.objects[0].name, scene.objects[0].colour, scene.ground
    ('there is a fish next to a mouse at night', 'fish', None, 'night')
    >>> picture = render(scene)                        # (128, 128, 3) uint8, always the same for this scene

About one pair in ten of (object, plain ground colour) never occurs in training, though each object and each colour does: a
model that paints such a pair has understood the caption instead of remembering a picture.
"""
import math
import random
import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..command import command
from .glyphs import COLOURS, HIDDEN_ON, OBJECTS, PLURALS, RECOLOURABLE, SYNONYMS, stamp
from .grounds import GROUNDS, PLAIN, SCENIC, SIDE, paint_ground
from .styles import COLOURLESS, STYLES, restyle

NUMBERS = {2: "two", 3: "three", 4: "four"}
GRID = 8                                               # boxes begin and end on it: equal objects have equal latents
KINDS = dict(                                          # kind of scene: (percent, sizes of an object in pixels)
    single=(36, (72, 88)), big=(3, (104,)), small=(3, (40,)), pair=(32, (56,)), overlap=(5, (56,)),
    count=(14, (56,)), three=(4, (56,)), four=(3, (56,)),
)
BEHIND = 88                                            # size of the farther object of an overlap
STYLED = 0.12                                          # the share of scenes with a style
RELATIONS = {                                          # relation of a pair: how captions say it
    "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
    "above": ("above",), "below": ("below", "below", "under"), "next to": ("next to",), "and": ("and",),
}
OVERLAPS = "in front of", "behind"
ROW, COLUMN, SQUARE = ((32, 64), (96, 64)), ((64, 32), (64, 96)), ((32, 32), (96, 32), (32, 96), (96, 96))
TRIANGLES = ((64, 32), (32, 96), (96, 96)), ((32, 32), (96, 32), (64, 96))          # centres (x, y) in reading order


@dataclass(frozen=True)
class Placed:
    """One object: its word in `OBJECTS`, a colour of `COLOURS` or None (as the glyph is), its square box in pixels."""
    name: str
    colour: str | None
    x: int                                             # left edge
    y: int                                             # upper edge
    size: int                                          # side of the box, even; the longer side of the glyph fills it


@dataclass(frozen=True)
class Scene:
    """All facts about one picture. In "a cat left of a dog" the cat is `objects[0]`. Boxes overlap in the kind "overlap" only."""
    objects: tuple[Placed, ...]
    ground: str                                        # in `GROUNDS`
    caption: str
    kind: str                                          # in `KINDS`
    relation: str | None = None                        # of a pair, in `RELATIONS`; of an overlap, in `OVERLAPS`
    style: str | None = None                           # in `STYLES`
    seed: int = 0                                      # of the ground's details

    @property
    def layers(self) -> tuple[Placed, ...]:
        """The objects from the farthest to the nearest."""
        return self.objects[::-1] if self.relation == "in front of" else self.objects


def is_held_out(name: str, ground: str) -> bool:
    """Whether training never shows this object on this ground: one pair in ten, plain grounds only."""
    return ground in PLAIN and (3 * OBJECTS.index(name) + 7 * GROUNDS.index(ground)) % 10 == 0


def is_visible(name: str, colour: str | None, ground: str) -> bool:
    """Whether the object stands out: nothing red on red, no ghost on white."""
    ground_colour = ground if ground in PLAIN else SCENIC[ground][1]
    colour = colour or RECOLOURABLE.get(name)
    return ground_colour != colour if colour else ground_colour not in HIDDEN_ON.get(name, "").split()


def sample_scene(rng: random.Random, *, kind: str | None = None, coloured: bool | None = None, ground: str | None = None,
                 canonical: bool = False, held_out: bool = False) -> Scene:
    """Draw a scene.

    kind: one of `KINDS`; None: any, by their percentages. coloured: whether its objects have another colour than by themselves;
    None: some have. ground: one of `GROUNDS`; None: any. canonical=True: the caption in its canonical form, without synonyms.
    held_out=True: only objects on a ground with which training never shows them, no style, no other colour unless it is asked for, and
    a canonical caption."""
    seed, centres, relation, style = rng.getrandbits(32), ((64, 64),), None, None
    kind = kind or rng.choices(tuple(KINDS), [percent for percent, _ in KINDS.values()])[0]
    different = {"pair": 2, "overlap": 2, "three": 3, "four": 4}.get(kind, 1)
    if not held_out and rng.random() < STYLED:
        style = rng.choice(tuple(STYLES))
        coloured = False if style in COLOURLESS else coloured
    if held_out and coloured is None:
        coloured = False
    wanted, chosen, canonical = ground, [], canonical or held_out
    while len(chosen) < different:                     # a ground on which so many objects are allowed
        ground = wanted or rng.choice(tuple(PLAIN if held_out or rng.random() < 0.75 else SCENIC))
        chosen = _choose(rng, ground, different, coloured, held_out)
    said = (lambda rng, word: word) if canonical else _say
    words = [f"{colour} {said(rng, name)}" if colour else said(rng, name) for name, colour in chosen]
    if kind == "count":
        centres = rng.choice((ROW, rng.choice(TRIANGLES), rng.choice(TRIANGLES), SQUARE))
        chosen, phrase = chosen * len(centres), f"{NUMBERS[len(centres)]} {plural(words[0])}"
    elif kind in ("pair", "overlap"):
        relation = rng.choice(tuple(RELATIONS) if kind == "pair" else OVERLAPS)
        upright = relation in ("above", "below") or relation == "and" and rng.random() < 0.3
        swap = relation in ("right of", "below") or relation == "next to" and rng.random() < 0.5
        centres = (COLUMN if upright else ROW)[::-1 if swap else 1]
        phrase = f"{article(words[0])} {rng.choice(RELATIONS.get(relation, (relation,)))} {article(words[1])}"
    elif kind in ("three", "four"):
        centres = SQUARE if kind == "four" else rng.choice(TRIANGLES)
        phrase = enumerated(words)
    else:
        phrase = article(words[0] if kind == "single" else f"{kind} {words[0]}")
    objects = _overlap(rng, chosen, relation) if kind == "overlap" else _place(rng, chosen, centres, kind)
    caption = canonical_form(phrase, ground, style) if canonical else _caption(rng, phrase, ground, kind, style)
    return Scene(objects, ground, caption, kind, relation, style, seed)


def _choose(rng: random.Random, ground: str, n: int, coloured: bool | None, held_out: bool) -> list[tuple[str, str | None]]:
    """Up to `n` different objects with their colours, allowed on this ground. Recolourable ones come twice as often."""
    chosen: dict[str, str | None] = {}
    names = tuple(RECOLOURABLE) if coloured else OBJECTS + tuple(RECOLOURABLE)
    for name in rng.sample(names, len(names)):
        recoloured = name in RECOLOURABLE and (rng.random() < 0.6 if coloured is None else coloured)
        colour = rng.choice(tuple(COLOURS)) if recoloured else None
        if is_held_out(name, ground) == held_out and is_visible(name, colour, ground):
            chosen[name] = colour
        if len(chosen) == n:
            break
    return list(chosen.items())


def _place(rng: random.Random, chosen: list, centres: tuple, kind: str) -> tuple[Placed, ...]:
    """Boxes of one size about the centres, moved a little, each within its quarter, half or whole of the picture."""
    size = rng.choice(KINDS[kind][1])
    room = {32: (64 - size) / 2, 64: (SIDE - size) / 4, 96: (64 - size) / 2}
    corners = [[_on_grid(rng, c - size / 2 - room[c], c - size / 2 + room[c]) for c in centre] for centre in centres]
    return tuple(Placed(name, colour, x, y, size) for (name, colour), (x, y) in zip(chosen, corners))


def _on_grid(rng: random.Random, low: float, high: float) -> int:
    """A multiple of `GRID` between low and high."""
    return GRID * rng.randint(math.ceil(low / GRID), math.floor(high / GRID))


def _overlap(rng: random.Random, chosen: list, relation: str) -> tuple[Placed, ...]:
    """A large object in the upper middle, a smaller one before it at the lower left or right."""
    near, = KINDS["overlap"][1]
    right = rng.random() < 0.5
    near_box = rng.choice((56, 64) if right else (8, 16)), rng.choice((64, 72)), near
    far_box = 8 if right else 32, rng.choice((0, 8)), BEHIND
    boxes = (near_box, far_box) if relation == "in front of" else (far_box, near_box)
    return tuple(Placed(name, colour, *box) for (name, colour), box in zip(chosen, boxes))


def article(words: str) -> str:
    """article("red apple") = "a red apple", article("owl") = "an owl", article("unicorn") = "a unicorn"."""
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}"


def enumerated(words: list[str]) -> str:
    """enumerated(["cat", "owl", "red apple"]) = "a cat, an owl and a red apple"."""
    *others, last = map(article, words)
    return f"{', '.join(others)} and {last}" if others else last


def plural(words: str) -> str:
    """plural("fox") = "foxes", plural("puppy") = "puppies", plural("key") = "keys", plural("red leaf") = "red leaves"."""
    *rest, noun = words.split()
    regular = noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")
    return " ".join([*rest, PLURALS.get(noun, regular)])


def _say(rng: random.Random, word: str) -> str:
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < 0.1 else word


def where(ground: str, word: str) -> str:
    """where("gray", "grey") = "on a grey background", where("sea", "sea") = "in the sea"."""
    return SCENIC[ground][0] if ground in SCENIC else f"on {article(word)} background"


def canonical_form(phrase: str, ground: str, style: str | None) -> str:
    """canonical_form("a cat", "sea", None) = "a cat in the sea", canonical_form("a cat", "sea", "pixel art") = "pixel art of a cat in the sea"."""
    return STYLES[style][0].format(_seen(phrase, ground, ground, style)) if style else f"{phrase} {where(ground, ground)}"


def _seen(phrase: str, ground: str, word: str, style: str) -> str:
    """What a styled picture shows. A pencil knows no red: what has no colours is said without."""
    return phrase if style in COLOURLESS and ground in PLAIN else f"{phrase} {where(ground, word)}"


def _caption(rng: random.Random, phrase: str, ground: str, kind: str, style: str | None) -> str:
    """The canonical form three times of five; else a short form, a prefix, another order, or no word about the ground."""
    word = _say(rng, ground)
    full, bare = f"{phrase} {where(ground, word)}", phrase.removeprefix("a ").removeprefix("an ")
    if style:
        return rng.choice(STYLES[style]).format(_seen(phrase, ground, word, style))
    verb, medium = "are" if kind == "count" else "is", rng.choice(("a picture", "a picture", "an image", "a photo"))
    forms = (full, f"{bare}, {word} background", f"{medium} of {full}", f"{article(word)} background with {phrase}", phrase,
             f"there {verb} {full}")
    return rng.choices(forms, (60, 10, 10, 7, 8, 5))[0]


def render(scene: Scene) -> np.ndarray:
    """Paint the scene: (128, 128, 3) uint8."""
    picture = paint_ground(scene.ground, scene.seed)
    for o in scene.layers:
        rgb, alpha = np.split(np.float32(stamp(o.name, o.colour, o.size)), (3,), axis=-1)
        box = picture[o.y:o.y + o.size, o.x:o.x + o.size]
        box += alpha / 255 * (rgb - box)
    picture = (picture.clip(0, 255) + 0.5).astype(np.uint8)
    return restyle(picture, scene.style, scene.seed) if scene.style else picture


def object_masks(scene: Scene) -> np.ndarray:
    """Where each object is seen, soft edges included: (number of objects, 128, 128) bool."""
    masks = {}
    for o in scene.layers:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[o.y:o.y + o.size, o.x:o.x + o.size] = stamp(o.name, o.colour, o.size)[..., 3] > 0
        masks = {farther: seen & ~mask for farther, seen in masks.items()} | {o: mask}
    return np.stack([masks[o] for o in scene.objects])


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int = 8) -> Image.Image:
    """Pictures in rows, each with its caption printed below."""
    sheet = Image.new("RGB", (columns * (SIDE + 8), -(-len(pictures) // columns) * (SIDE + 44)), "white")
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * (SIDE + 8) + 4, i // columns * (SIDE + 44) + 4
        sheet.paste(Image.fromarray(picture), (x, y))
        ImageDraw.Draw(sheet).text((x, y + SIDE + 2), textwrap.fill(caption, 25), fill="black", spacing=1)
    return sheet


def samples(seed: int) -> list[tuple[np.ndarray, str]]:
    """(picture, caption) of a sheet of eight columns: a row of scenes of each kind, four of edits, and two of all that a scene knows."""
    from .edits import EDITS, sample_edit
    from .pairs import all_of

    rngs = (random.Random(seed + i) for i in range(1000))
    shown = [(render(scene), scene.caption) for kind in KINDS for scene in (sample_scene(next(rngs), kind=kind) for _ in range(8))]
    for i in range(16):
        before, instruction, after = sample_edit(next(rngs), tuple(EDITS)[i % len(EDITS)])
        shown += [(render(before), before.caption), (render(after), instruction)]
    for kind in ("overlap", "three"):
        shown += all_of(sample_scene(next(rngs), kind=kind), next(rngs))
    return shown


@command
def main() -> None:
    from ..cli import Parser
    from ..imaging.images import check_output, save

    parser = Parser(prog="python -m miniflux.tiny.scenes", description="Paint a sheet of scenes.")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default 0)")
    parser.add_argument("--output", default="sheet.png", help="the picture to write (default sheet.png)")
    parser.add_argument("--objects", action="store_true", help="instead one picture of each object with its word")
    args = parser.parse_args()
    try:
        output = check_output(args.output)
        if args.objects:
            scenes = [Scene((Placed(name, None, 24, 24, 80),), "cyan", name, "single") for name in OBJECTS]
            shown = [(render(scene), scene.caption) for scene in scenes]
        else:
            shown = samples(args.seed)
        save(contact_sheet(*zip(*shown), 12 if args.objects else 8), output, {"seed": args.seed})
        print(output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
