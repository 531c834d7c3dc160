"""Masks: white is repainted, black is kept.

    mask_from_alpha, blur_mask, expand_canvas     masks from images, masks and margins
    read_masks, fit_masks, latent_mask            masks as the tasks need them
    around_mask, feather, paste                   the region of a mask, enlarged and pasted back
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

Crop = Callable[[RGBImage], Image.Image]
Paste = Callable[[Tensor], Tensor]


def mask_from_alpha(image: Image.Image | str | os.PathLike) -> Image.Image:
    """A mask from an image with transparency: white where it is transparent.

    Raises ValueError for an opaque image."""
    if not isinstance(image, Image.Image):
        image = open_image(image, "image")
    if not image.has_transparency_data:
        raise ValueError("the image has no transparent part that could be the mask: give a mask")
    image = ImageOps.exif_transpose(image)
    if image.mode == "La":                                  # which Pillow converts to LA alone
        image = image.convert("LA")
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def blur_mask(mask: ImageLike, radius: float = 12) -> Image.Image:
    """The mask in grey, with a Gaussian edge.

    Tasks threshold masks at one half, so this rounds corners and closes gaps. It also softens the
    seam where a region is pasted back.

    radius: in pixels, 0 to 1000."""
    radius = check_number("the blur's radius", radius, 0, 1000)
    grey = as_pil(read_image(mask, "mask", "black", is_mask=True)).convert("L")
    return grey.filter(ImageFilter.GaussianBlur(radius))


def expand_canvas(image: ImageLike, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0,
                  overlap: int = 0) -> tuple[Image.Image, Image.Image]:
    """Outpainting: the image on a larger grey canvas, and the mask of the new part.

    left, top, right, bottom: margins in pixels.
    overlap: pixels of the image's edge beside a margin that are repainted too, to hide the seam.

    Returns (image, mask), ready for `fill`."""
    image = as_pil(read_image(image))
    given = {"left": left, "top": top, "right": right, "bottom": bottom, "overlap": overlap}
    checked = [check_number(name, value, 0, MAX_SIDE, whole=True) for name, value in given.items()]
    *margins, overlap = checked
    left, top, right, bottom = margins
    if not any(margins) or 2 * overlap >= min(image.size):
        raise ValueError(f"the margins are {tuple(margins)}, the overlap {overlap} of "
                         f"{image.width} x {image.height} pixels: expected a margin above 0 and an "
                         "overlap below half the image")
    size = image.width + left + right, image.height + top + bottom
    canvas = Image.new("RGB", size, (127, 127, 127))
    canvas.paste(image, (left, top))
    mask = Image.new("L", size, 255)
    x1, y1, x2, y2 = (overlap if margin else 0 for margin in margins)
    mask.paste(0, (left + x1, top + y1, left + image.width - x2, top + image.height - y2))
    return canvas, mask


def read_masks(source: ImageLike | list[ImageLike], images: list[RGBImage]) -> list[Image.Image]:
    """A mask for each image.

    source: one mask, or one for each image. Transparent parts are black, so that white strokes on a
        transparent ground are a mask. A mask of another size than its image will be resized, which
        is logged once."""
    masks = [as_pil(mask) for mask in read_images(source, "mask", "black", is_mask=True)]
    if len(masks) not in (1, len(images)):
        raise ValueError(f"there are {len(masks)} masks for {len(images)} images: "
                         "give one, or one for each")
    have, need = size_of(masks[0]), size_of(images[0])
    if have != need:
        log.warning("the mask of %d x %d is resized to the image's %d x %d", *have, *need)
    return masks * (len(images) // len(masks))


def fit_masks(masks: list[Image.Image], width: int, height: int) -> Tensor:
    """Masks as zeros and ones (n, 1, H, W); 1, from half grey on, is repainted.

    Raises ValueError for an empty mask."""
    # Note: resized, then converted to grey, then thresholded: in the references' order.
    grey = [mask.resize((width, height), LANCZOS).convert("L") for mask in masks]
    values = np.stack([np.asarray(mask, np.float32) / 255 for mask in grey])    # (n, H, W)
    hole = torch.from_numpy(values)[:, None] >= 0.5                             # (n, 1, H, W)
    if not hole.flatten(1).any(1).all():
        raise ValueError("the mask is empty: expected white where the image is to be repainted")
    return hole.float()


def latent_mask(hole: Tensor) -> Tensor:
    """Zeros and ones (n, 1, H, W) -> (n, 1, H/8, W/8), true where the latents are repainted.

    Each latent pixel follows the first of its 8x8 pixels."""
    mask = hole[:, :, ::8, ::8] > 0
    if not mask.any():
        raise ValueError("the mask is too thin: expected white regions of at least 8 x 8 pixels of "
                         "the painted image")
    return mask


def crop_box(mask: Image.Image, width: int, height: int, padding: int) -> tuple[int, int, int, int]:
    """The region around everything that is not black in the mask.

    It is `padding` pixels wider on each side, and grown to the shape of width x height as far as
    the image reaches.

    Returns (x1, y1, x2, y2)."""
    box = mask.convert("L").getbbox()
    if box is None:
        raise ValueError("the mask is empty: expected white where the image is to be repainted")
    x1 = max(box[0] - padding, 0)
    y1 = max(box[1] - padding, 0)
    x2 = min(box[2] + padding, mask.width)
    y2 = min(box[3] + padding, mask.height)
    w, h, ratio = x2 - x1, y2 - y1, width / height
    if w / h > ratio:
        y1, y2 = grow(y1, y2, int(w / ratio - h), mask.height)
    else:
        x1, x2 = grow(x1, x2, int(h * ratio - w), mask.width)
    return x1, y1, x2, y2


def grow(low: int, high: int, by: int, limit: int) -> tuple[int, int]:
    """[low, high) longer by `by`, on both sides alike, then shifted or cut to fit in [0, limit)."""
    low, high = low - by // 2, high + by - by // 2
    low, high = low - max(high - limit, 0), min(high, limit)
    return (0, min(high - low, limit)) if low < 0 else (low, high)


def letterbox(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole image in the middle of width x height; its edges are stretched over the rest."""
    tall = width / height < image.width / image.height      # there is room above and below
    w, h = width, height
    if tall:
        h = max(image.height * width // image.width, 1)
    else:
        w = max(image.width * height // image.height, 1)
    image = image.resize((w, h), LANCZOS)
    x, y = width // 2 - w // 2, height // 2 - h // 2
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, (x, y))
    if tall and y:
        canvas.paste(image.resize((width, y), box=(0, 0, w, 0)), (0, 0))
        canvas.paste(image.resize((width, y), box=(0, h, w, h)), (0, y + h))
    elif not tall and x:
        canvas.paste(image.resize((x, height), box=(0, 0, 0, h)), (0, 0))
        canvas.paste(image.resize((x, height), box=(w, 0, w, h)), (x + w, 0))
    return canvas


def feather(hole: Tensor, width: int = 4) -> Tensor:
    """A mask of zeros and ones (B, 1, H, W) whose ones rise from its edge over `width` pixels.

    Zeros stay zeros."""
    shrunk = [1 - F.max_pool2d(1 - hole, 2 * i + 1, stride=1, padding=i) for i in range(width + 1)]
    return torch.stack(shrunk).mean(0)


def paste(painted: Tensor, images: Tensor, weight: Tensor,
          box: tuple[int, int, int, int] | None = None) -> Tensor:
    """Paste what was painted into its images.

    painted: (B, 3, h, w).
    images: (n, 3, H, W); n divides B.
    weight: (n, 1, H, W) in [0, 1]; where it is 0, an image stays bit for bit.
    box: (x1, y1, x2, y2) in the images' pixels, where it belongs (default: everywhere).

    Returns (B, 3, H, W)."""
    x1, y1, x2, y2 = box or (0, 0, images.shape[3], images.shape[2])
    w, h = x2 - x1, y2 - y1
    height, width = painted.shape[2:]
    # Note: resized to cover the box, then cropped to its middle: the edges that `letterbox` added
    # fall off again.
    if w / h > width / height:
        size = (w, height * w // width)
    else:
        size = (width * h // height, h)
    x, y = size[0] // 2 - w // 2, size[1] // 2 - h // 2
    painted = torch.cat([to_tensor(image.cpu(), *size) for image in painted])
    images = images.repeat_interleave(len(painted) // len(images), dim=0)       # (B, 3, H, W)
    weight = weight.repeat_interleave(len(painted) // len(weight), dim=0)       # (B, 1, H, W)
    layer = images.clone()
    layer[:, :, y1:y2, x1:x2] = painted[:, :, y:y + h, x:x + w]
    return images * (1 - weight) + layer * weight                               # (B, 3, H, W)


def around_mask(images: list[RGBImage], masks: list[Image.Image], width: int, height: int,
                padding: int) -> tuple[Crop, Paste]:
    """The region around the mask, `padding` pixels wider on each side.

    Returns two functions. The first crops the region from an image of the same scene and enlarges
    it to width x height. The second pastes what was painted there back into the image.

    Raises ValueError for more than one image, and for an empty mask."""
    padding = check_number("mask_padding", padding, 0, MAX_SIDE, whole=True)
    if len(images) > 1:
        raise ValueError(f"mask_padding works on one image, got {len(images)}: call once for each")
    image = as_pil(images[0])
    mask = masks[0].resize(image.size, LANCZOS)
    box = crop_box(mask, width, height, padding)
    grey = np.asarray(mask.convert("L"), np.float32) / 255
    weight = torch.from_numpy(grey)[None, None]                                 # (1, 1, H, W)

    def crop(whole: RGBImage) -> Image.Image:
        return letterbox(as_pil(whole).resize(image.size, LANCZOS).crop(box), width, height)

    def paste_back(painted: Tensor) -> Tensor:
        return paste(painted, to_tensor(image, *image.size), weight, box)

    return crop, paste_back
