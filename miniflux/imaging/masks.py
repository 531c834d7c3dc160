"""Masks: white is to be repainted, black is to be kept; and what was repainted, put back into its picture.

    mask_from_alpha, blur_mask, expand_canvas     masks from pictures, masks and margins
    read_masks, fit_masks, latent_mask            masks as the tasks need them
    around_mask, feather, paste                   the region of a mask, enlarged; and what was painted, put back
"""

import logging
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ..checks import check_number
from .images import LANCZOS, MAX_SIDE, as_pil, to_tensor
from .reading import ImageLike, RGBImage, open_image, read_image, read_images, size_of

log = logging.getLogger("miniflux")


def mask_from_alpha(image: Image.Image | str | os.PathLike) -> Image.Image:
    """A mask from a picture with transparency: white where nothing is to be seen. Raises ValueError for an opaque one."""
    picture = image if isinstance(image, Image.Image) else open_image(image, "picture")
    if not picture.has_transparency_data:
        raise ValueError("the picture has no transparent part that could be the mask: give a mask")
    return ImageOps.invert(ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A"))


def blur_mask(mask: ImageLike, radius: float = 12) -> Image.Image:
    """The mask, grey, with a Gaussian edge of so many pixels. Tasks cut masks at one half, so this rounds corners and closes
    gaps; and it softens the seam where a region is pasted back."""
    radius = check_number("the blur's radius", radius, 0, 1000)
    return as_pil(read_image(mask, "mask", "black", is_mask=True)).convert("L").filter(ImageFilter.GaussianBlur(radius))


def expand_canvas(image: ImageLike, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0,
                  overlap: int = 0) -> tuple[Image.Image, Image.Image]:
    """Outpainting: the picture on a larger grey canvas, and the mask of what is new: (picture, mask), ready for `fill`.

    The margins are in pixels; `overlap` pixels of the picture's edge beside a margin are repainted too, to hide the seam."""
    picture = as_pil(read_image(image))
    given = {"left": left, "top": top, "right": right, "bottom": bottom, "overlap": overlap}
    *margins, overlap = (check_number(name, value, 0, MAX_SIDE, whole=True) for name, value in given.items())
    left, top, right, bottom = margins
    if not any(margins) or 2 * overlap >= min(picture.size):
        raise ValueError(f"the margins are {tuple(margins)}, the overlap {overlap} of {picture.width} x {picture.height} pixels: expected "
                         "a margin above 0 and an overlap below half the picture")
    size = picture.width + left + right, picture.height + top + bottom
    canvas, mask = Image.new("RGB", size, (127, 127, 127)), Image.new("L", size, 255)
    canvas.paste(picture, (left, top))
    x1, y1, x2, y2 = (overlap if margin else 0 for margin in margins)
    mask.paste(0, (left + x1, top + y1, left + picture.width - x2, top + picture.height - y2))
    return canvas, mask


def read_masks(source: ImageLike | list[ImageLike], pictures: list[RGBImage]) -> list[Image.Image]:
    """A mask for each picture, from one or from as many. Transparent parts count as black, so that white strokes on nothing
    are a mask. One of another size than its picture will be resized, which is said once."""
    masks = [as_pil(mask) for mask in read_images(source, "mask", "black", is_mask=True)]
    if len(masks) not in (1, len(pictures)):
        raise ValueError(f"there are {len(masks)} masks for {len(pictures)} pictures: give one, or one for each")
    if (have := size_of(masks[0])) != (need := size_of(pictures[0])):
        log.warning("the mask of %d x %d is resized to the picture's %d x %d", *have, *need)
    return masks * (len(pictures) // len(masks))


def fit_masks(masks: list[Image.Image], width: int, height: int) -> Tensor:
    """(n, 1, H, W) of zeros and ones, 1 from half grey on: to be repainted. Raises ValueError for a mask without any."""
    # Note: resized first, then turned to grey, then cut at one half: in the references' order.
    grey = [np.asarray(mask.resize((width, height), LANCZOS).convert("L"), np.float32) / 255 for mask in masks]
    hole = torch.from_numpy(np.stack(grey))[:, None] >= 0.5
    if not hole.flatten(1).any(1).all():
        raise ValueError("the mask is empty: expected white where the picture is to be repainted")
    return hole.float()


def latent_mask(hole: Tensor) -> Tensor:
    """(n, 1, H, W) of zeros and ones -> (n, 1, H/8, W/8), true where the latents are to be repainted: each latent pixel
    follows the first of its 8x8 pixels."""
    if not (mask := hole[:, :, ::8, ::8] > 0).any():
        raise ValueError("the mask is too thin: expected white regions of at least 8 x 8 pixels of the painted picture")
    return mask


def crop_box(mask: Image.Image, width: int, height: int, padding: int) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) around all that is not black in the mask, `padding` pixels wider, grown to the shape of
    width x height as far as the picture reaches."""
    if (box := mask.convert("L").getbbox()) is None:
        raise ValueError("the mask is empty: expected white where the picture is to be repainted")
    x1, y1, x2, y2 = box
    x1, y1, x2, y2 = max(x1 - padding, 0), max(y1 - padding, 0), min(x2 + padding, mask.width), min(y2 + padding, mask.height)
    w, h, ratio = x2 - x1, y2 - y1, width / height
    if w / h > ratio:
        y1, y2 = grow(y1, y2, int(w / ratio - h), mask.height)
    else:
        x1, x2 = grow(x1, x2, int(h * ratio - w), mask.width)
    return x1, y1, x2, y2


def grow(low: int, high: int, by: int, limit: int) -> tuple[int, int]:
    """[low, high) longer by `by`, on both sides alike, but shifted or cut to lie within [0, limit)."""
    low, high = low - by // 2, high + by - by // 2
    low, high = low - max(high - limit, 0), min(high, limit)
    return (0, min(high - low, limit)) if low < 0 else (low, high)


def letterbox(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture in the middle of width x height, its edges stretched over what is left."""
    tall = width / height < picture.width / picture.height                     # there is room above and below
    w, h = (width, picture.height * width // picture.width) if tall else (picture.width * height // picture.height, height)
    w, h = max(w, 1), max(h, 1)
    picture = picture.resize((w, h), LANCZOS)
    x, y = width // 2 - w // 2, height // 2 - h // 2
    canvas = Image.new(picture.mode, (width, height))
    canvas.paste(picture, (x, y))
    if tall and y:
        canvas.paste(picture.resize((width, y), box=(0, 0, w, 0)), (0, 0))
        canvas.paste(picture.resize((width, y), box=(0, h, w, h)), (0, y + h))
    elif not tall and x:
        canvas.paste(picture.resize((x, height), box=(0, 0, 0, h)), (0, 0))
        canvas.paste(picture.resize((x, height), box=(w, 0, w, h)), (x + w, 0))
    return canvas


def feather(hole: Tensor, width: int = 4) -> Tensor:
    """A mask (B, 1, H, W) of zeros and ones whose ones rise from its edge over `width` pixels; zeros stay zeros."""
    return torch.stack([1 - F.max_pool2d(1 - hole, 2 * i + 1, stride=1, padding=i) for i in range(width + 1)]).mean(0)


def paste(painted: Tensor, pictures: Tensor, weight: Tensor, box: tuple[int, int, int, int] | None = None) -> Tensor:
    """The painted pictures (B, 3, h, w) in their place, box (x1, y1, x2, y2) of pictures (n, 3, H, W), where the weight
    (n, 1, H, W) is above zero; where it is zero, a picture stays bit for bit."""
    x1, y1, x2, y2 = box or (0, 0, pictures.shape[3], pictures.shape[2])
    w, h, (height, width) = x2 - x1, y2 - y1, painted.shape[2:]
    # Note: so large that it covers the box, and then its middle: the edges that `letterbox` added fall off again.
    size = (w, height * w // width) if w / h > width / height else (width * h // height, h)
    x, y = size[0] // 2 - w // 2, size[1] // 2 - h // 2
    painted = torch.cat([to_tensor(picture.cpu(), *size) for picture in painted])
    pictures, weight = (each.repeat_interleave(len(painted) // len(each), dim=0) for each in (pictures, weight))
    layer = pictures.clone()
    layer[:, :, y1:y2, x1:x2] = painted[:, :, y:y + h, x:x + w]
    return pictures * (1 - weight) + layer * weight                             # (B, 3, H, W)


def around_mask(pictures: list[RGBImage], masks: list[Image.Image], width: int, height: int, padding: int
                ) -> tuple[Callable[[RGBImage], Image.Image], Callable[[Tensor], Tensor]]:
    """The region around the mask, `padding` pixels wider: (what cuts it out of a picture of the same scene and enlarges it to
    width x height, what puts back there what was painted). Raises ValueError for more than one picture, and for an empty mask."""
    padding = check_number("mask_padding", padding, 0, MAX_SIDE, whole=True)
    if len(pictures) > 1:
        raise ValueError(f"mask_padding works on one picture, got {len(pictures)}: call once for each")
    picture, mask = as_pil(pictures[0]), masks[0].resize(size_of(pictures[0]), LANCZOS)
    box = crop_box(mask, width, height, padding)
    weight = torch.from_numpy(np.asarray(mask.convert("L"), np.float32) / 255)[None, None]  # (1, 1, H, W)

    def near(whole: RGBImage) -> Image.Image:
        return letterbox(as_pil(whole).resize(picture.size, LANCZOS).crop(box), width, height)

    return near, lambda painted: paste(painted, to_tensor(picture, *picture.size), weight, box)
