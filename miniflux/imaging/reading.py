"""Reading: paths, PIL images, arrays and tensors -> one known form.

    read_image      one image
    read_each       one or several, of any sizes
    read_images     one or several, of one size

`read_image` states the rule by which the numbers of every type and mode are read.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

MAX_PIXELS = 89_478_485    # of an image given by the caller: Pillow's own limit, a quarter of a GB
ADDRESSES = ("http:", "https:", "ftp:", "data:")

# What a caller may give.
ImageLike = Image.Image | str | os.PathLike | np.ndarray | Tensor
# Once read: an upright RGB image, or (3, H, W) in [0, 1] where floating-point numbers were given.
RGBImage = Image.Image | Tensor


def read_image(source: ImageLike, what: str = "image", background: str = "white",
               is_mask: bool = False) -> RGBImage:
    """One image from whatever a caller may give, by one rule:

    - A file or a PIL image is turned upright, laid on the background where it is transparent, and
      converted to RGB. Modes of numbers (I, I;16, F) are read as arrays of them.
    - An array is (H, W), (H, W, 1) or (H, W, 3), a tensor (H, W), (1, H, W) or (3, H, W).
      Floats are in [0, 1] and keep their precision. Booleans are black and white. Bytes run from 0
      to 255, 16-bit numbers from 0 to 65535. Larger integers run to 255 where none of them is above
      it, else to 65535. A fourth channel of integers is alpha.
    - A mask whose largest number is 1 consists of zeros and ones, whatever its type.

    what: the word for it in errors. background: the colour beneath transparent parts.

    Raises FileNotFoundError for a missing file, ValueError for everything else."""
    if isinstance(source, (str, os.PathLike)):
        source = open_image(source, what)
    if isinstance(source, Tensor):
        source = to_array(source, what)
    if isinstance(source, np.ndarray):
        source = from_numbers(source, what, is_mask)
    if isinstance(source, Image.Image):
        return to_rgb(source, background, what, is_mask)
    if not isinstance(source, Tensor):
        raise ValueError(f"the {what} is a {type(source).__name__}: expected a PIL image, a path, "
                         "an array (H, W, 3) or a tensor (3, H, W)")
    return source


def read_each(source: ImageLike | list[ImageLike], what: str = "image", background: str = "white",
              is_mask: bool = False) -> list[RGBImage]:
    """One image, or several: a list, an array (B, H, W, 3) or a tensor (B, 3, H, W)."""
    is_batch = isinstance(source, (np.ndarray, Tensor)) and source.ndim == 4
    several = source if is_batch or isinstance(source, (list, tuple)) else [source]
    images = [read_image(one, what, background, is_mask) for one in several]
    if not images:
        raise ValueError(f"there is no {what}: expected one, or a list of them")
    return images


def read_images(source: ImageLike | list[ImageLike], what: str = "image", background: str = "white",
                is_mask: bool = False) -> list[RGBImage]:
    """As `read_each`, but all of one size, since they are worked on together."""
    images = read_each(source, what, background, is_mask)
    sizes = {size_of(image) for image in images}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:5])
        raise ValueError(f"the {what}s of one call must have one size, got {listed}: resize them, "
                         "or call once for each")
    return images


def size_of(image: RGBImage) -> tuple[int, int]:
    """(width, height)."""
    return image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])


# --------------------------------------------------------------------------------------- by kind


def open_image(source: str | os.PathLike, what: str) -> Image.Image:
    """The decoded image of a file.

    Refused before decoding if its header claims more than MAX_PIXELS."""
    if str(source).startswith(ADDRESSES):
        raise ValueError(f"the {what} {str(source):.100} is an address, which is not fetched: "
                         "download it first, and give the file")
    path = Path(source).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"the {what} {path} does not exist as a file: it is a folder; "
                                "expected an image file in it")
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist: expected an image file")
    try:
        with Image.open(path) as image:
            # Note: Pillow only warns here; its warning as an error would be one for all threads.
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return image
    except Image.DecompressionBombError:
        raise ValueError(f"the {what} {path} claims more than {MAX_PIXELS:,} pixels: "
                         "make it smaller first") from None
    except Exception as error:                              # Pillow's decoders raise what they like
        raise ValueError(f"the {what} {path} cannot be read as an image "
                         f"({type(error).__name__}: {str(error):.80})") from None


def to_array(tensor: Tensor, what: str) -> np.ndarray:
    """(H, W), (1, H, W), (3, H, W) or (4, H, W) -> (H, W) or (H, W, channels)."""
    if tensor.ndim not in (2, 3) or tensor.ndim == 3 and len(tensor) not in (1, 3, 4):
        raise ValueError(f"the {what} is a tensor of the shape {tuple(tensor.shape)}: "
                         "expected (3, H, W)")
    tensor = tensor.detach().cpu()
    if tensor.ndim == 3:
        tensor = tensor.permute(1, 2, 0)                                        # (H, W, channels)
    # Note: NumPy has no bfloat16.
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def from_numbers(array: np.ndarray, what: str, is_mask: bool = False) -> Image.Image | Tensor:
    """An array (H, W), (H, W, 1), (H, W, 3) or, of integers, (H, W, 4), as `read_image` states."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or not array.size or channels not in (1, 3, 4):
        raise ValueError(f"the {what} is an array of the shape {array.shape}: "
                         "expected (H, W) or (H, W, 3)")
    if array.ndim == 3 and channels == 1:
        array = array[..., 0]
    is_float = np.issubdtype(array.dtype, np.floating)
    is_real = is_float or array.dtype == bool or np.issubdtype(array.dtype, np.integer)
    low, high = (array.min(), array.max()) if is_real else ("?", "?")
    in_range = is_real and low >= 0 and high <= (1 if is_float else 65535)
    if not in_range or channels == 4 and is_float:
        raise ValueError(f"the {what} holds {array.dtype} from {low} to {high}: "
                         "expected uint8, or floats in [0, 1]")
    if is_float:
        planes = torch.from_numpy(np.array(array, np.float32).reshape(*array.shape[:2], -1))
        return planes.permute(2, 0, 1).expand(3, -1, -1)                        # (3, H, W)
    if array.dtype == bool or is_mask and high == 1:
        return Image.fromarray(array.astype(np.uint8) * 255)
    if array.dtype.itemsize == 2 or high > 255:
        array = (array / 257).round()                                           # 65535 = 257 · 255
    return Image.fromarray(array.astype(np.uint8))


def to_rgb(image: Image.Image, background: str, what: str, is_mask: bool = False) -> RGBImage:
    """Upright, opaque, RGB: what `read_image` states, for a PIL image of any mode."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"the {what} has {image.width} x {image.height} pixels: "
                         f"expected 1 to {MAX_PIXELS:,}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        # Note: Pillow's own conversion cuts 16-bit values off at 255 instead of scaling them.
        image = from_numbers(np.asarray(image), what, is_mask)
        if isinstance(image, Tensor):
            return image
    if image.mode in ("La", "RGBa"):                        # colours multiplied by alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    try:
        image = lab_to_rgb(image) if image.mode == "LAB" else image.convert("RGB")
    except Exception:                                       # Pillow raises what it likes
        raise ValueError(f"the {what} is a PIL image of mode {image.mode}, "
                         "which has no RGB form") from None
    if is_mask and max(high for _, high in image.getextrema()) == 1:
        image = image.point(lambda value: 255 * value)
    return image


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """CIELAB -> sRGB, which Pillow converts by colour profiles only."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
