"""The objects of the tiny world: one emoji glyph and one clear word each; some can be given another colour.

    >>> stamp("apple", "blue", 64).shape               # a blue apple in a box of 64x64 pixels, RGBA
    (64, 64, 4)

The font is needed to paint, not to import: Debian package `fonts-noto-color-emoji`, SIL Open Font Licence.
"""
import colorsys
import os
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
    bird="🐦", parrot="🦜", chick="🐤", cow="🐮", horse="🐴", mouse="🐭", tiger="🐯", koala="🐨", snail="🐌", dolphin="🐬",
    dinosaur="🦖", unicorn="🦄", flamingo="🦩", peach="🍑", tomato="🍅", avocado="🥑", trumpet="🎺", pretzel="🥨", lollipop="🍭",
    cookie="🍪", truck="🚚", helicopter="🚁", snowman="⛄", cloud="☁", shoe="👟", shirt="👕", camera="📷", chair="🪑", door="🚪",
    castle="🏰", tent="⛺", diamond="💎", pencil="✏", drum="🥁", backpack="🎒", bucket="🪣",
)
OBJECTS = tuple(GLYPHS)
SYNONYMS = dict(                                       # said instead of the word in one caption of ten
    cat=("kitten", "kitty"), dog=("puppy",), rabbit=("bunny",), ladybug=("ladybird",), burger=("hamburger",), donut=("doughnut",),
    car=("automobile",), rocket=("spaceship",), boat=("sailboat",), bicycle=("bike",), plane=("airplane",), gift=("present",),
    ball=("football",), clock=("alarm clock",), cup=("mug",), hat=("top hat",), mushroom=("toadstool",), leaf=("maple leaf",),
    horse=("pony",), dinosaur=("t-rex",), truck=("lorry",), shoe=("sneaker",), shirt=("t-shirt",), bucket=("pail",),
    diamond=("gem",), backpack=("rucksack",), bird=("bluebird",), castle=("fortress",), cookie=("biscuit",),
    gray=("grey",), cyan=("turquoise",),
)
PLURALS = dict(wolf="wolves", leaf="leaves", sheep="sheep", fish="fish", mouse="mice", snowman="snowmen", tomato="tomatoes")
COLOURS = dict(                                        # the colours an object can be told to have
    red=(222, 40, 36), orange=(250, 132, 16), yellow=(252, 208, 40), green=(58, 166, 62), blue=(44, 104, 226),
    purple=(144, 64, 196), pink=(250, 128, 184), brown=(134, 84, 48), black=(52, 52, 56), white=(238, 238, 242),
    gray=(150, 152, 156), cyan=(64, 202, 210),
)
RECOLOURABLE = dict(                                   # object: the colour its glyph has by itself (None: between two names)
    apple="red", car="red", heart="red", balloon="red", book="red", teapot="red", rose="red", mushroom="red", guitar="red",
    star="yellow", key="yellow", bell="yellow", fish="blue", dress="blue", umbrella=None, leaf=None,
    shoe="blue", tent="orange", backpack="red", bucket="blue",
)
HIDDEN_ON = dict(                                      # grounds on which a glyph by itself can hardly be seen
    ghost="white", cup="white", hat="black", bear="brown", lion="brown", owl="brown", wolf="gray", elephant="gray",
    robot="gray", bicycle="gray", whale="gray cyan", strawberry="red", clock="red", leaf="red", crab="red", fox="orange",
    carrot="orange", burger="orange", pumpkin="orange", sun="orange yellow", moon="yellow", crown="yellow", lemon="yellow",
    umbrella="blue purple", bird="blue", chick="yellow", mouse="gray", tiger="orange", koala="gray", dolphin="blue",
    dinosaur="green", unicorn="white", flamingo="pink", peach="orange", tomato="red", trumpet="yellow orange", pretzel="brown",
    cookie="brown", snowman="white", cloud="white", shirt="cyan", camera="black gray", chair="brown", door="brown",
    diamond="cyan",
)


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


