"""Images that were read -> tensors of the size to paint, and back.

    natural_size, round_size      the size to paint
    preprocess, standardise       what a network is given
    to_pil                        what a task returns
"""

import logging

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import quote, to_number
from .reading import RGBImage, size_of

log = logging.getLogger("miniflux")

MULTIPLE = 16              # pixels a side of one token: 8 for the autoencoder, 2 for the patch
MAX_SIDE = 16_384
OUTPUTS = ("pil", "tensor", "latents")
LANCZOS = Image.Resampling.LANCZOS
BICUBIC = Image.Resampling.BICUBIC

# Mean and standard deviation of red, green and blue.
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = list[Image.Image] | Tensor                         # what a task returns

# ----------------------------------------------------------------------------------------- sizes


def check_side(name: str, value) -> int:
    """A width or height as a Python number. Raises ValueError for anything else."""
    side = to_number(value, whole=True)
    if side is None or not MULTIPLE <= side <= MAX_SIDE:
        raise ValueError(f"{name} is {quote(value)}: expected a whole number of pixels "
                         f"from {MULTIPLE} to {MAX_SIDE}")
    return side


def floor_side(value: float) -> int:
    """The multiple of 16 below, from 16 to MAX_SIDE."""
    return min(max(round(value) // MULTIPLE * MULTIPLE, MULTIPLE), MAX_SIDE)


def round_size(width: int, height: int) -> tuple[int, int]:
    """Both sides rounded down to multiples of 16; a change is logged once.

    Raises ValueError for a side out of range."""
    width, height = check_side("width", width), check_side("height", height)
    rounded = floor_side(width), floor_side(height)
    if rounded != (width, height):
        log.warning("%d x %d is painted as %d x %d: sides are multiples of %d",
                    width, height, *rounded, MULTIPLE)
    return rounded


def natural_size(like: tuple[int, int], area: int, width: int | None = None,
                 height: int | None = None) -> tuple[int, int]:
    """The size to paint, in the shape of another image.

    like: (width, height) of that image, in pixels.
    area: about how many pixels to paint.
    width, height: a side that the caller asks for; the other follows from it.

    Returns (width, height) in multiples of 16.

    >>> natural_size((840, 840), 1024**2), natural_size((1232, 1632), 1024**2)
    ((1024, 1024), (880, 1168))
    >>> natural_size((640, 480), 1024**2, width=512)
    (512, 384)
    """
    ratio = like[0] / like[1]
    if width is None:
        natural_width = floor_side(height * ratio if height else (area * ratio) ** 0.5)
    if height is None:
        natural_height = floor_side(width / ratio if width else (area / ratio) ** 0.5)
    return (natural_width if width is None else width,
            natural_height if height is None else height)


# --------------------------------------------------------------------------------------- tensors


def to_tensor(image: RGBImage, width: int, height: int,
              resample: Image.Resampling = LANCZOS) -> Tensor:
    """(1, 3, H, W) in [0, 1].

    Where the size differs, the image is resized in 8 bits a channel, as Pillow does."""
    if size_of(image) != (width, height):
        image = as_pil(image).resize((width, height), resample)
    if isinstance(image, Tensor):
        return image[None]
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


def as_pil(image: RGBImage) -> Image.Image:
    return image if isinstance(image, Image.Image) else to_pil(image[None])[0]


def preprocess(images: list[RGBImage], width: int, height: int,
               resample: Image.Resampling = LANCZOS) -> Tensor:
    """The input of a network: (n, 3, H, W) in [-1, 1]."""
    return torch.cat([to_tensor(image, width, height, resample) for image in images]) * 2 - 1


def standardise(pixels: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(x - mean) / deviation for each colour.

    pixels: (n, 3, H, W) in [0, 1]. colours: CLIP_COLOURS or IMAGENET_COLOURS, as the network was
    trained."""
    mean, deviation = (torch.tensor(row, device=pixels.device).view(3, 1, 1) for row in colours)
    return (pixels - mean) / deviation


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL images."""
    array = images.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]
