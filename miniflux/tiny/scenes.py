"""The tiny world: pictures of 128x128 composed by code, each with a caption that is exactly true.

A scene is a few emoji glyphs on a plain or scenic ground. Because code composes it, everything about it is known without
labelling. A `Scene` holds these facts, `render` paints them, `object_masks` outlines them: one world for every task, text to
image (caption, picture), filling (masks), editing (scenes that differ in one field), and for judging what a model paints.

    >>> scene = sample_scene(random.Random(3))
    >>> scene.caption, scene.objects[0].name, scene.objects[0].colour, scene.ground
    ('a blue teapot on a yellow background', 'teapot', 'blue', 'yellow')
    >>> picture = render(scene)                        # (128, 128, 3) uint8, always the same for this scene

About one pair in ten of (object, plain ground colour) never occurs in training, though each object and each colour does: a
model that paints such a pair has understood the caption instead of remembering a picture.

The font is needed to paint, not to import: Debian package `fonts-noto-color-emoji`, SIL Open Font Licence.
"""
import colorsys
import os
import random
import textwrap
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 128                                             # of every picture, in pixels
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
FONT_SIZE = 109                                        # Note: a bitmap font; it opens at this size only
FONT_PATHS = tuple(os.path.expanduser(f"{folder}/NotoColorEmoji.ttf") for folder in (
    "/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts/google-noto-emoji",
    "/usr/share/fonts/google-noto-color-emoji-fonts", "~/.local/share/fonts", "~/.fonts"))      # Debian, Arch, Fedora, own

GLYPHS = dict(                                         # the order counts: held-out pairs are found by index
    cat="🐱", dog="🐶", fox="🦊", owl="🦉", frog="🐸", pig="🐷", lion="🦁", panda="🐼", rabbit="🐰", bear="🐻", monkey="🐵",
    wolf="🐺", penguin="🐧", elephant="🐘", sheep="🐑", turtle="🐢", fish="🐟", whale="🐳", octopus="🐙", crab="🦀", butterfly="🦋",
    bee="🐝", ladybug="🐞", duck="🦆", apple="🍎", banana="🍌", pear="🍐", lemon="🍋", strawberry="🍓", pineapple="🍍",
    watermelon="🍉", carrot="🥕", mushroom="🍄", pizza="🍕", burger="🍔", donut="🍩", cake="🎂", car="🚗", rocket="🚀", boat="⛵",
    train="🚂", bus="🚌", bicycle="🚲", plane="✈", tractor="🚜", tree="🌳", sunflower="🌻", rose="🌹", cactus="🌵", leaf="🍁",
    star="⭐", heart="❤", balloon="🎈", umbrella="☂", guitar="🎸", key="🔑", book="📕", house="🏠", moon="🌙", sun="☀", bell="🔔",
    crown="👑", hat="🎩", gift="🎁", ball="⚽", clock="⏰", robot="🤖", ghost="👻", pumpkin="🎃", dress="👗", cup="☕", teapot="🫖",
)
OBJECTS = tuple(GLYPHS)
SYNONYMS = dict(                                       # said instead of the word in one caption of ten
    cat=("kitten", "kitty"), dog=("puppy",), rabbit=("bunny",), ladybug=("ladybird",), burger=("hamburger",), donut=("doughnut",),
    car=("automobile",), rocket=("spaceship",), boat=("sailboat",), bicycle=("bike",), plane=("airplane",), gift=("present",),
    ball=("football",), clock=("alarm clock",), cup=("mug",), hat=("top hat",), mushroom=("toadstool",), leaf=("maple leaf",),
    gray=("grey",), cyan=("turquoise",),
)
PLURALS = dict(wolf="wolves", leaf="leaves", sheep="sheep", fish="fish")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLAIN = dict(                                          # the plain grounds
    red=(214, 52, 48), orange=(243, 142, 48), yellow=(248, 220, 84), green=(76, 166, 82), blue=(62, 104, 208),
    purple=(136, 78, 176), pink=(246, 160, 192), brown=(126, 82, 52), black=(28, 28, 30), white=(246, 246, 246),
    gray=(146, 148, 152), cyan=(84, 208, 212),
)
SCENIC = dict(                                         # scenic ground: (how the caption says it, the plain colour it resembles)
    sea=("in the sea", "blue"), sky=("in the sky", "cyan"), grass=("on the grass", "green"),
    night=("at night", "black"), snow=("in the snow", "white"), desert=("in the desert", "yellow"),
)
GROUNDS = tuple(PLAIN) + tuple(SCENIC)
COLOURS = dict(                                        # the colours an object can be told to have
    red=(222, 40, 36), orange=(250, 132, 16), yellow=(252, 208, 40), green=(58, 166, 62), blue=(44, 104, 226),
    purple=(144, 64, 196), pink=(250, 128, 184),
)
RECOLOURABLE = dict(                                   # object: the colour its glyph has by itself (None: between two names)
    apple="red", car="red", heart="red", balloon="red", book="red", teapot="red", rose="red", mushroom="red", guitar="red",
    star="yellow", key="yellow", bell="yellow", fish="blue", dress="blue", umbrella=None, leaf=None,
)
HIDDEN_ON = dict(                                      # grounds on which a glyph by itself can hardly be seen
    ghost="white", cup="white", hat="black", bear="brown", lion="brown", owl="brown", wolf="gray", elephant="gray",
    robot="gray", bicycle="gray", whale="gray cyan", strawberry="red", clock="red", leaf="red", crab="red", fox="orange",
    carrot="orange", burger="orange", pumpkin="orange", sun="orange yellow", moon="yellow", crown="yellow", lemon="yellow",
    umbrella="blue purple",
)
KINDS = dict(                                          # kind of scene: (percent; size of an object / SIDE, from, to)
    single=(57, 0.55, 0.75), big=(5, 0.80, 0.90), small=(5, 0.30, 0.38),
    pair=(20, 0.40, 0.47), count=(10, 0.38, 0.45), three=(3, 0.38, 0.45),
)
RELATIONS = {                                          # relation: how captions say it
    "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
    "above": ("above",), "below": ("below", "below", "under"), "next to": ("next to",), "and": ("and",),
}
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
    """All facts about one picture. In "a cat left of a dog" the cat is `objects[0]`. Boxes never overlap."""
    objects: tuple[Placed, ...]
    ground: str                                        # in `GROUNDS`
    caption: str
    kind: str                                          # in `KINDS`
    relation: str | None = None                        # of a pair, in `RELATIONS`
    seed: int = 0                                      # of the ground's details


def is_held_out(name: str, ground: str) -> bool:
    """Whether training never shows this object on this ground: one pair in ten, plain grounds only."""
    return ground in PLAIN and (3 * OBJECTS.index(name) + 7 * GROUNDS.index(ground)) % 10 == 0


def is_visible(name: str, colour: str | None, ground: str) -> bool:
    """Whether the object stands out: nothing red on red, no ghost on white."""
    ground_colour = ground if ground in PLAIN else SCENIC[ground][1]
    colour = colour or RECOLOURABLE.get(name)
    return ground_colour != colour if colour else ground_colour not in HIDDEN_ON.get(name, "").split()


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw a scene. `held_out=True`: one object on a ground it is never trained with, the caption in its canonical form."""
    seed, centres, relation = rng.getrandbits(32), ((64, 64),), None
    if held_out:
        (caption, name, ground), = held_out_prompts(1, seed)
        return Scene(_place(rng, [(name, None)], centres, "single"), ground, caption, "single", seed=seed)
    ground = rng.choice(tuple(PLAIN if rng.random() < 0.75 else SCENIC))
    kind = rng.choices(tuple(KINDS), [weight for weight, _, _ in KINDS.values()])[0]
    chosen = _choose(rng, ground, {"pair": 2, "three": 3}.get(kind, 1))
    words = [f"{colour} {_say(rng, name)}" if colour else _say(rng, name) for name, colour in chosen]
    if kind == "count":
        centres = rng.choice((ROW, ROW, rng.choice(TRIANGLES), SQUARE))
        chosen, phrase = chosen * len(centres), f"{NUMBERS[len(centres)]} {plural(words[0])}"
    elif kind == "pair":
        relation = rng.choice(tuple(RELATIONS))
        upright = relation in ("above", "below") or relation == "and" and rng.random() < 0.3
        swap = relation in ("right of", "below") or relation == "next to" and rng.random() < 0.5
        centres = (COLUMN if upright else ROW)[::-1 if swap else 1]
        phrase = f"{article(words[0])} {rng.choice(RELATIONS[relation])} {article(words[1])}"
    elif kind == "three":
        centres, phrase = rng.choice(TRIANGLES), f"{article(words[0])}, {article(words[1])} and {article(words[2])}"
    else:
        phrase = article(words[0] if kind == "single" else f"{kind} {words[0]}")
    return Scene(_place(rng, chosen, centres, kind), ground, _caption(rng, phrase, ground), kind, relation, seed)


def held_out_prompts(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """`n` triples (prompt, object, ground) that training never shows, in random order; each once before any comes again."""
    rng, prompts = random.Random(seed), []
    pairs = [(o, g) for o in OBJECTS for g in PLAIN if is_held_out(o, g) and is_visible(o, None, g)]
    while len(prompts) < n:
        rng.shuffle(pairs)
        prompts += [(f"{article(name)} {_where(ground, ground)}", name, ground) for name, ground in pairs]
    return prompts[:n]


def _choose(rng: random.Random, ground: str, n: int) -> list[tuple[str, str | None]]:
    """`n` different objects with their colours, allowed on this ground. Recolourable ones come twice as often."""
    chosen: dict[str, str | None] = {}
    while len(chosen) < n:
        name = rng.choice(OBJECTS + tuple(RECOLOURABLE))
        colour = rng.choice(tuple(COLOURS)) if name in RECOLOURABLE and rng.random() < 0.6 else None
        if name not in chosen and not is_held_out(name, ground) and is_visible(name, colour, ground):
            chosen[name] = colour
    return list(chosen.items())


def _place(rng: random.Random, chosen: list, centres: tuple, kind: str) -> tuple[Placed, ...]:
    """Boxes about the centres, moved a little, each within its quarter, half or whole of the picture."""
    size = 2 * round(SIDE * rng.uniform(*KINDS[kind][1:]) / 2)              # even: fewer sizes to keep in memory
    room = {32: (64 - size) / 2, 64: (SIDE - size) / 4, 96: (64 - size) / 2}
    corners = [[round(c - size / 2 + rng.uniform(-room[c], room[c])) for c in centre] for centre in centres]
    return tuple(Placed(name, colour, x, y, size) for (name, colour), (x, y) in zip(chosen, corners))


def article(words: str) -> str:
    """article("red apple") = "a red apple", article("owl") = "an owl"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(words: str) -> str:
    """plural("fox") = "foxes", plural("puppy") = "puppies", plural("key") = "keys", plural("red leaf") = "red leaves"."""
    *rest, noun = words.split()
    regular = noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + ("es" if noun[-1] in "sx" else "s")
    return " ".join([*rest, PLURALS.get(noun, regular)])


def _say(rng: random.Random, word: str) -> str:
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < 0.1 else word


def _where(ground: str, word: str) -> str:
    """_where("gray", "grey") = "on a grey background", _where("sea", "sea") = "in the sea"."""
    return SCENIC[ground][0] if ground in SCENIC else f"on {article(word)} background"


def _caption(rng: random.Random, phrase: str, ground: str) -> str:
    """The canonical form two times of three; else a short form, a prefix, another order, or no word about the ground."""
    word = _say(rng, ground)
    full, short = f"{phrase} {_where(ground, word)}", phrase.removeprefix("a ").removeprefix("an ")
    forms = full, f"{short}, {word} background", f"a picture of {full}", f"{article(word)} background with {phrase}", phrase
    return rng.choices(forms, (66, 10, 10, 6, 8))[0]


@lru_cache(maxsize=None)
def _glyph(name: str, colour: str | None) -> Image.Image:
    """The glyph in its full size, cropped, RGBA; recoloured unless the colour is its own."""
    path = next((path for path in FONT_PATHS if os.path.exists(path)), None)
    if path is None:
        raise FileNotFoundError("NotoColorEmoji.ttf was not found: install it with `apt-get install fonts-noto-color-emoji`")
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), GLYPHS[name], font=ImageFont.truetype(path, FONT_SIZE), embedded_color=True)
    glyph = canvas.crop(canvas.getbbox())
    return glyph if colour in (None, RECOLOURABLE.get(name)) else _recolour(glyph, COLOURS[colour])


def _recolour(glyph: Image.Image, rgb: tuple[int, int, int]) -> Image.Image:
    """Turn the glyph's dominant hue into that of `rgb`; saturation and brightness keep their relief about a new median."""
    hue, saturation, value = np.moveaxis(np.asarray(glyph.convert("RGB").convert("HSV"), np.float32), -1, 0) / 255
    solid = np.asarray(glyph.getchannel("A")) > 128
    histogram = np.bincount((hue * 36).astype(int).ravel() % 36, (saturation * value * solid).ravel(), 36)
    peak = (np.argmax(histogram + np.roll(histogram, 1) + np.roll(histogram, -1)) + 0.5) / 36
    distance = (hue - peak + 0.5) % 1 - 0.5            # on the circle of hues, in turns
    dominant = (np.abs(distance) < 0.085) & (saturation > 0.3)
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    new = (h + 0.3 * distance) % 1, *(x * y / np.median(x[dominant & solid]) for x, y in ((saturation, s), (value, v)))
    hsv = np.where(dominant[..., None], np.stack(new, -1), np.stack((hue, saturation, value), -1))
    painted = Image.fromarray((hsv.clip(0, 1) * 255).round().astype(np.uint8), "HSV").convert("RGB")
    return Image.merge("RGBA", (*painted.split(), glyph.getchannel("A")))


@lru_cache(maxsize=4096)
def stamp(name: str, colour: str | None, size: int) -> np.ndarray:
    """The glyph in the middle of a square box: (size, size, 4) uint8."""
    glyph, box = _glyph(name, colour), Image.new("RGBA", (size, size))
    w, h = (round(side * size / max(glyph.size)) for side in glyph.size)
    box.paste(glyph.resize((w, h), Image.LANCZOS), ((size - w) // 2, (size - h) // 2))
    return np.asarray(box)


def _fade(upper: tuple, lower: tuple, top: int = 0, bottom: int = SIDE) -> np.ndarray:
    """A vertical gradient between two colours from row `top` to row `bottom`: (128, 128, 3)."""
    t = ((_Y - top) / (bottom - top)).clip(0, 1)[..., None]
    return np.float32(upper) * (1 - t) + np.float32(lower) * t


def paint_ground(ground: str, seed: int) -> np.ndarray:
    """The ground alone: (128, 128, 3) float32 in 0..255. The seed moves its shade, horizon, waves, clouds and stars."""
    noise = np.random.default_rng(seed)
    if ground in PLAIN:
        return np.tile(np.float32(PLAIN[ground] + noise.uniform(-9, 9, 3)), (SIDE, SIDE, 1))
    phase, horizon = noise.uniform(0, 6.28), noise.uniform(30, 46)
    edge = horizon + 4 * np.sin(_X * 0.05 + phase)     # of hills and dunes
    if ground == "sea":
        waves = np.sin(_X * 0.22 + _Y * 0.9 + phase) * np.sin(_Y * 0.45 + phase) > 0.7
        picture = _fade((70, 150, 214), (16, 72, 150), 30) + 26 * waves[..., None]
        picture = np.where((_Y < horizon)[..., None], _fade((186, 226, 250), (222, 240, 250), 0, 46), picture)
    elif ground == "sky":
        picture = _fade((72, 156, 236), (190, 226, 250))
        for x, y, r in noise.uniform((0, 8, 9), (SIDE, 120, 17), (4, 3)):
            for dx, s in ((-0.9, 0.7), (0, 1), (0.9, 0.65)):                # a cloud is three ellipses
                picture[((_X - x - dx * r) / (s * r)) ** 2 + ((_Y - y) / (0.6 * s * r)) ** 2 < 1] = (246, 250, 254)
    elif ground == "grass":
        blades = 9 * np.sin(_X * 1.7 + 3 * np.sin(_Y * 0.5 + phase)) * np.sin(_Y * 0.6 + _X * 0.3)
        picture = _fade((128, 200, 84), (64, 148, 52), 30) + blades[..., None]
        picture = np.where((_Y < edge)[..., None], _fade((172, 220, 250), (220, 240, 252), 0, 46), picture)
    elif ground == "desert":
        picture = _fade((250, 214, 150), (253, 236, 196), 0, 56)
        for lower, colour in ((0, (236, 190, 116)), (26, (224, 170, 92)), (54, (210, 152, 76))):
            picture[_Y > edge + lower + 4 * np.sin(_X * 0.04 + lower)] = colour
    elif ground == "night":
        picture = _fade((10, 12, 38), (36, 38, 84))
    else:                                              # snow
        picture = _fade((250, 252, 255), (222, 232, 244), 40)
        picture = np.where((_Y < edge + 12)[..., None], _fade((150, 178, 206), (196, 214, 230), 0, 56), picture)
    if ground in ("night", "snow"):                    # stars and flakes, one or two pixels wide
        for x, y in noise.integers(1, SIDE - 2, (36, 2)):
            picture[y:y + 1 + x % 2, x:x + 1 + x % 2] = (250, 248, 232) if ground == "night" else 255
    return picture


def render(scene: Scene) -> np.ndarray:
    """Paint the scene: (128, 128, 3) uint8."""
    picture = paint_ground(scene.ground, scene.seed)
    for o in scene.objects:
        rgb, alpha = np.split(np.float32(stamp(o.name, o.colour, o.size)), (3,), axis=-1)
        box = picture[o.y:o.y + o.size, o.x:o.x + o.size]
        box += alpha / 255 * (rgb - box)
    return (picture.clip(0, 255) + 0.5).astype(np.uint8)


def object_masks(scene: Scene) -> np.ndarray:
    """Where each object covers the ground, soft edges included: (number of objects, 128, 128) bool."""
    masks = np.zeros((len(scene.objects), SIDE, SIDE), bool)
    for mask, o in zip(masks, scene.objects):
        mask[o.y:o.y + o.size, o.x:o.x + o.size] = stamp(o.name, o.colour, o.size)[..., 3] > 0
    return masks


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int = 8) -> Image.Image:
    """Pictures in rows, each with its caption printed below."""
    sheet = Image.new("RGB", (columns * (SIDE + 8), -(-len(pictures) // columns) * (SIDE + 44)), "white")
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * (SIDE + 8) + 4, i // columns * (SIDE + 44) + 4
        sheet.paste(Image.fromarray(picture), (x, y))
        ImageDraw.Draw(sheet).text((x, y + SIDE + 2), textwrap.fill(caption, 25), fill="black", spacing=1)
    return sheet


def main() -> None:
    from ..cli import Parser
    from ..images import check_output, save

    parser = Parser(prog="python -m miniflux.tiny.scenes", description="Paint a sheet of scenes.")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default 0)")
    parser.add_argument("--output", default="sheet.png", help="the picture to write (default sheet.png)")
    parser.add_argument("--objects", action="store_true", help="instead one picture of each object with its word")
    args = parser.parse_args()
    scenes = [sample_scene(random.Random(args.seed + i)) for i in range(48)]
    if args.objects:
        scenes = [Scene((Placed(name, None, 24, 24, 80),), "cyan", name, "single") for name in OBJECTS]
    try:
        output = check_output(args.output)
        sheet = contact_sheet([render(s) for s in scenes], [s.caption for s in scenes], 12 if args.objects else 8)
        save(sheet, output, {"seed": args.seed})
        print(output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
