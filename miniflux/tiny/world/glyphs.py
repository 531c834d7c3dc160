"""The objects of the world as pixels: one emoji glyph each; some can have another colour.

    >>> stamp("apple", "blue", 64).shape               # a blue apple in a box of 64x64 pixels, RGBA
    (64, 64, 4)

The font is needed to render, not to import: Debian package `fonts-noto-color-emoji`, SIL Open Font
Licence.
"""

import colorsys
import os
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .words import ALL_OBJECTS, RECOLOURABLE

FONT_SIZE = 109                          # Note: a bitmap font; it opens at this size only
FONT_PATHS = tuple(os.path.expanduser(f"{folder}/NotoColorEmoji.ttf") for folder in (
    "/usr/share/fonts/truetype/noto",                  # Debian
    "/usr/share/fonts/noto",                           # Arch
    "/usr/share/fonts/google-noto-emoji",              # Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts",
    "~/.local/share/fonts",
    "~/.fonts"))

GLYPHS = dict(zip(ALL_OBJECTS, (
    "🐱", "🐶", "🦊", "🦉", "🐸", "🐷", "🦁", "🐼", "🐰", "🐻", "🐵", "🐺",
    "🐧", "🐘", "🐑", "🐢", "🐟", "🐳", "🐙", "🦀", "🦋",
    "🐝", "🐞", "🦆", "🍎", "🍌", "🍐", "🍋", "🍓", "🍍",
    "🍉", "🥕", "🍄", "🍕", "🍔", "🍩", "🎂", "🚗", "🚀",
    "⛵", "🚂", "🚌", "🚲", "✈", "🚜", "🌳", "🌻", "🌹", "🌵",
    "🍁", "⭐", "❤", "🎈", "☂", "🎸", "🔑", "📕", "🏠", "🌙",
    "☀", "🔔", "👑", "🎩", "🎁", "⚽", "⏰", "🤖", "👻", "🎃", "👗",
    "☕", "🫖", "🐦", "🦜", "🐤", "🐮", "🐴", "🐭", "🐯", "🐨", "🐌",
    "🐬", "🦖", "🦄", "🦩", "🍑", "🍅", "🥑", "🎺",
    "🥨", "🍭", "🍪", "🚚", "🚁", "⛄", "☁", "👟", "👕",
    "📷", "🪑", "🚪", "🏰", "⛺", "💎", "✏", "🥁", "🎒", "🪣"), strict=True))
COLOURS = dict(                          # the colours that an object can have
    red=(222, 40, 36), orange=(250, 132, 16), yellow=(252, 208, 40), green=(58, 166, 62),
    blue=(44, 104, 226), purple=(144, 64, 196), pink=(250, 128, 184), brown=(134, 84, 48),
    black=(52, 52, 56), white=(238, 238, 242), gray=(150, 152, 156), cyan=(64, 202, 210),
)
HIDDEN_ON = dict(                        # plain grounds on which a glyph can hardly be seen
    ghost="white", cup="white", hat="black", bear="brown", lion="brown", owl="brown", wolf="gray",
    elephant="gray", robot="gray", bicycle="gray", whale="gray cyan", strawberry="red",
    clock="red", leaf="red", crab="red", fox="orange", carrot="orange", burger="orange",
    pumpkin="orange", sun="orange yellow", moon="yellow", crown="yellow", lemon="yellow",
    umbrella="blue purple", bird="blue", chick="yellow", mouse="gray", tiger="orange",
    koala="gray", dolphin="blue", dinosaur="green", unicorn="white", flamingo="pink",
    peach="orange", tomato="red", trumpet="yellow orange", pretzel="brown", cookie="brown",
    snowman="white", cloud="white", shirt="cyan", camera="black gray", chair="brown", door="brown",
    diamond="cyan",
)


@cache
def _glyph(name: str, colour: str | None) -> Image.Image:
    """The glyph in its full size, cropped, RGBA; recoloured unless the colour is its own."""
    path = next((path for path in FONT_PATHS if os.path.exists(path)), None)
    if path is None:
        raise FileNotFoundError("NotoColorEmoji.ttf was not found: "
                                "install it with `apt-get install fonts-noto-color-emoji`")
    canvas = Image.new("RGBA", (200, 200))
    font = ImageFont.truetype(path, FONT_SIZE)
    ImageDraw.Draw(canvas).text((20, 20), GLYPHS[name], font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getbbox())
    return glyph if colour in (None, RECOLOURABLE.get(name)) else _recolour(glyph, COLOURS[colour])


def _recolour(glyph: Image.Image, rgb: tuple[int, int, int]) -> Image.Image:
    """Replace the glyph's dominant hue by that of `rgb`; saturation and brightness keep their
    relief about a new median."""
    hsv = np.asarray(glyph.convert("RGB").convert("HSV"), np.float32) / 255
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    solid = np.asarray(glyph.getchannel("A")) > 128
    weights = (saturation * value * solid).ravel()
    histogram = np.bincount((hue * 36).astype(int).ravel() % 36, weights, 36)
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    peak = (np.argmax(smooth) + 0.5) / 36
    distance = (hue - peak + 0.5) % 1 - 0.5            # on the circle of hues, in full turns
    dominant = (np.abs(distance) < 0.085) & (saturation > 0.3)
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    new = np.stack([
        (h + 0.3 * distance) % 1,
        saturation * (s / np.median(saturation[dominant & solid])),
        value * (v / np.median(value[dominant & solid]))], axis=-1)
    hsv = np.where(dominant[..., None], new, np.stack((hue, saturation, value), axis=-1))
    painted = Image.fromarray((hsv.clip(0, 1) * 255).round().astype(np.uint8), "HSV").convert("RGB")
    return Image.merge("RGBA", (*painted.split(), glyph.getchannel("A")))


@lru_cache(maxsize=4096)
def stamp(name: str, colour: str | None, size: int) -> np.ndarray:
    """The glyph in the middle of a square box: (size, size, 4) uint8."""
    glyph = _glyph(name, colour)
    box = Image.new("RGBA", (size, size))
    w, h = (round(side * size / max(glyph.size)) for side in glyph.size)
    box.paste(glyph.resize((w, h), Image.LANCZOS), ((size - w) // 2, (size - h) // 2))
    return np.asarray(box)
