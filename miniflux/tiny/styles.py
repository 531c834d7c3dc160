"""The styles of the tiny world: four ways to redraw a picture, and how captions say them.

    pencil sketch      dark where the picture is darker than its blur, on paper
    pixel art          mean colours of 4x4 pixels, in six steps each
    black and white    the luminance
    watercolour        the mean of the calmest quarter around each pixel (Kuwahara's filter, 1976), thinned with paper
"""
import numpy as np
from PIL import Image, ImageFilter

STYLES = {                                             # style: what captions say, {} stands for the rest
    "pencil sketch": ("a pencil sketch of {}", "{}, pencil sketch", "a pencil drawing of {}"),
    "pixel art": ("pixel art of {}", "{}, pixel art", "a pixel art picture of {}"),
    "black and white": ("{} in black and white", "a black and white picture of {}", "a black and white photo of {}"),
    "watercolour": ("a watercolour of {}", "{}, watercolour", "a watercolor painting of {}"),
}
COLOURLESS = ("pencil sketch", "black and white")


def restyle(picture: np.ndarray, style: str, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 -> the same shape. The seed is that of the paper's grain."""
    image = Image.fromarray(picture)
    if style == "black and white":
        return np.asarray(image.convert("L").convert("RGB"))
    if style == "pixel art":
        small = np.asarray(image.resize((image.width // 4, image.height // 4), Image.BOX))
        return np.repeat(np.repeat((small / 51).round() * 51, 4, axis=0), 4, axis=1).astype(np.uint8)
    noise = np.random.default_rng(seed)
    if style == "pencil sketch":
        grey = image.convert("L")
        dodged = np.float32(grey) / np.maximum(np.float32(grey.filter(ImageFilter.GaussianBlur(4))), 1)
        grain = noise.normal(0, 5, dodged.shape)
        drawn = 250 * dodged.clip(0, 1) ** 1.5 - 26 * (1 - np.float32(grey) / 255) + grain          # lines, then a light shading
        return np.repeat(drawn.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    pigment = np.asarray(Image.fromarray(noise.integers(0, 255, (8, 8), np.uint8)).resize(image.size, Image.BICUBIC), np.float32)
    thinned = _kuwahara(picture) * 0.78 + 52 + (pigment[..., None] - 128) * 0.12
    return thinned.clip(0, 255).astype(np.uint8)


def _kuwahara(picture: np.ndarray, radius: int = 3) -> np.ndarray:
    """Of the four squares that have a pixel as their corner, the mean of the one with the least variance: (H, W, 3) float32."""
    x = np.pad(np.float32(picture), ((radius, radius), (radius, radius), (0, 0)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(x, (radius + 1, radius + 1), axis=(0, 1))    # (H + r, W + r, 3, r+1, r+1)
    mean, variance = windows.mean((-2, -1)), windows.var((-2, -1)).sum(-1)
    h, w = picture.shape[:2]
    corners = [(slice(y, y + h), slice(x, x + w)) for y in (0, radius) for x in (0, radius)]
    calmest = np.argmin(np.stack([variance[corner] for corner in corners]), axis=0)[..., None]
    return np.select([calmest == i for i in range(4)], [mean[corner] for corner in corners])
