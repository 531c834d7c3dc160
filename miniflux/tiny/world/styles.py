"""The styles of the world: four ways to redraw an image, and their words in a caption.

    pencil sketch      dark where the image is darker than its blur, on paper
    pixel art          mean colours of 4x4 pixels, in six steps each
    black and white    the luminance
    watercolour        the mean of the calmest quarter around each pixel (Kuwahara's filter, 1976),
                       thinned with paper
"""

import numpy as np
from PIL import Image, ImageFilter

STYLES = {                               # style: its captions; {} stands for the rest
    "pencil sketch": ("a pencil sketch of {}", "{}, pencil sketch", "a pencil drawing of {}"),
    "pixel art": ("pixel art of {}", "{}, pixel art", "a pixel art picture of {}"),
    "black and white": ("{} in black and white", "a black and white picture of {}",
                        "a black and white photo of {}"),
    "watercolour": ("a watercolour of {}", "{}, watercolour", "a watercolor painting of {}"),
}
COLOURLESS = ("pencil sketch", "black and white")


def restyle(image: np.ndarray, style: str, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 -> the same shape. The seed is that of the paper's grain."""
    noise = np.random.default_rng(seed)
    if style == "black and white":
        return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    if style == "pixel art":
        return _pixel_art(image)
    if style == "pencil sketch":
        return _pencil_sketch(image, noise)
    return _watercolour(image, noise)


def _pixel_art(image: np.ndarray) -> np.ndarray:
    h, w = image.shape[:2]
    small = np.asarray(Image.fromarray(image).resize((w // 4, h // 4), Image.BOX))
    return np.repeat(np.repeat((small / 51).round() * 51, 4, axis=0), 4, axis=1).astype(np.uint8)


def _pencil_sketch(image: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    grey = Image.fromarray(image).convert("L")
    blurred = np.float32(grey.filter(ImageFilter.GaussianBlur(4)))
    dodged = np.float32(grey) / np.maximum(blurred, 1)
    grain = noise.normal(0, 5, dodged.shape)
    lines = 250 * dodged.clip(0, 1) ** 1.5
    shading = 26 * (1 - np.float32(grey) / 255)
    drawn = (lines - shading + grain).clip(0, 255).astype(np.uint8)
    return np.repeat(drawn[..., None], 3, axis=-1)


def _watercolour(image: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    spots = Image.fromarray(noise.integers(0, 255, (8, 8), np.uint8))
    pigment = np.asarray(spots.resize(image.shape[1::-1], Image.BICUBIC), np.float32)
    thinned = _kuwahara(image) * 0.78 + 52 + (pigment[..., None] - 128) * 0.12
    return thinned.clip(0, 255).astype(np.uint8)


def _kuwahara(image: np.ndarray, radius: int = 3) -> np.ndarray:
    """Of the four squares that have a pixel as their corner, the mean of the one with the least
    variance: (H, W, 3) float32."""
    x = np.pad(np.float32(image), ((radius, radius), (radius, radius), (0, 0)), "edge")
    window = (radius + 1, radius + 1)
    windows = np.lib.stride_tricks.sliding_window_view(x, window, axis=(0, 1))
    mean = windows.mean((-2, -1))                                               # (H+r, W+r, 3)
    variance = windows.var((-2, -1)).sum(-1)                                    # (H+r, W+r)
    h, w = image.shape[:2]
    corners = [(slice(y, y + h), slice(x, x + w)) for y in (0, radius) for x in (0, radius)]
    calmest = np.argmin(np.stack([variance[corner] for corner in corners]), axis=0)[..., None]
    return np.select([calmest == i for i in range(4)], [mean[corner] for corner in corners])
