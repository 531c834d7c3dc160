"""Pictures on disk and in memory <-> tensors: what may be given as one, sizes, conversions, and the text a PNG carries.

    read_images       paths, PIL images, arrays, tensors -> one known form
    natural_size      the size to paint in the shape of a picture
    preprocess, to_pil   that form -> tensors of the size to paint, and back
    save              a picture with its making, whole or not at all
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from ..checks import check_number as check_number
from ..checks import quote, to_number

log = logging.getLogger("miniflux")

MULTIPLE = 16              # pixels a side that one token covers: 8 for the autoencoder, 2 for the patch
MAX_SIDE = 16_384
MAX_PIXELS = 89_478_485    # of a picture given by the caller: Pillow's own limit, a quarter of a GB
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SIDES = {".png": 2**31 - 1, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}      # the most pixels a side
OUTPUTS = ("pil", "tensor", "latents")
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and deviation of red, green, blue
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC

Images = list[Image.Image] | Tensor  # what a task returns
ImageLike = Image.Image | str | os.PathLike | np.ndarray | Tensor
RGBImage = Image.Image | Tensor          # once read: an upright RGB picture, or (3, H, W) in [0, 1] where numbers were given

# ------------------------------------------------------------------------------------------------------------- reading


def open_image(source: str | os.PathLike, what: str) -> Image.Image:
    """The decoded picture of a file; refused before decoding if it claims to be larger than MAX_PIXELS."""
    if str(source).startswith(("http:", "https:", "ftp:", "data:")):
        raise ValueError(f"the {what} {str(source):.100} is an address, which is not fetched: download it first, and give the file")
    path = Path(source).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"the {what} {path} does not exist as a file: it is a folder; expected a picture file in it")
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist: expected a picture file")
    try:
        with Image.open(path) as picture:
            # Note: Pillow only warns here; its warning as an error would be one for all threads.
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            picture.load()
            return picture
    except Image.DecompressionBombError:
        raise ValueError(f"the {what} {path} claims more than {MAX_PIXELS:,} pixels: make it smaller first") from None
    except Exception as error:                              # Pillow's decoders raise what they like
        raise ValueError(f"the {what} {path} cannot be read as a picture ({type(error).__name__}: {str(error):.80})") from None


def to_rgb(picture: Image.Image, background: str, what: str, is_mask: bool = False) -> Image.Image | Tensor:
    """Upright, opaque, RGB: what `read_image` describes, for a PIL picture of any mode."""
    if not 0 < picture.width * picture.height <= MAX_PIXELS:
        raise ValueError(f"the {what} has {picture.width} x {picture.height} pixels: expected 1 to {MAX_PIXELS:,}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Note: Pillow's own conversion cuts 16-bit values off at 255 instead of scaling them.
        picture = from_numbers(np.asarray(picture), what, is_mask)
        if isinstance(picture, Tensor):
            return picture
    if picture.mode in ("La", "RGBa"):                      # colours that were multiplied by alpha
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[picture.mode])
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    try:
        picture = lab_to_rgb(picture) if picture.mode == "LAB" else picture.convert("RGB")
    except Exception:                                       # Pillow raises what it likes
        raise ValueError(f"the {what} is a PIL picture of mode {picture.mode}, which has no RGB form") from None
    if is_mask and max(high for _, high in picture.getextrema()) == 1:
        picture = picture.point(lambda value: 255 * value)
    return picture


def lab_to_rgb(picture: Image.Image) -> Image.Image:
    """Pillow converts CIELAB by colour profiles only."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(picture, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))


def from_numbers(array: np.ndarray, what: str, is_mask: bool = False) -> Image.Image | Tensor:
    """An array (H, W), (H, W, 1), (H, W, 3) or, of whole numbers, (H, W, 4); its numbers as `read_image` describes."""
    channels = array.shape[2] if array.ndim == 3 else 1
    is_real = array.dtype == bool or np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    if array.ndim not in (2, 3) or not array.size or channels not in (1, 3, 4):
        raise ValueError(f"the {what} is an array of the shape {array.shape}: expected (H, W) or (H, W, 3)")
    array = array[..., 0] if array.ndim == 3 and channels == 1 else array
    low, high = (array.min(), array.max()) if is_real else ("?", "?")
    fits = is_real and (low >= 0 and high <= (1 if np.issubdtype(array.dtype, np.floating) else 65535))
    if not fits or channels == 4 and np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"the {what} holds {array.dtype} from {low} to {high}: expected uint8, or floats in [0, 1]")
    if np.issubdtype(array.dtype, np.floating):
        planes = torch.from_numpy(np.array(array, np.float32).reshape(*array.shape[:2], -1)).permute(2, 0, 1)
        return planes.expand(3, -1, -1)                                         # (3, H, W)
    if array.dtype == bool or is_mask and high == 1:
        return Image.fromarray(array.astype(np.uint8) * 255)
    if array.dtype.itemsize > 1 and (array.dtype.itemsize == 2 or high > 255):
        array = (array / 257).round()
    return Image.fromarray(array.astype(np.uint8))


def read_image(source: ImageLike, what: str = "picture", background: str = "white", is_mask: bool = False) -> RGBImage:
    """One picture from whatever a caller may give, by one rule:

    - a file or a PIL picture: turned upright, laid on the background where it is transparent, and converted to RGB; modes of
      numbers (I, I;16, F) count as arrays of these;
    - an array (H, W), (H, W, 1), (H, W, 3) or a tensor (H, W), (1, H, W), (3, H, W): floats are in [0, 1], and keep their
      precision; booleans are black and white; bytes run from 0 to 255, 16-bit numbers from 0 to 65535; larger types run to
      255 where none of their numbers is above it, else to 65535; with four channels, the last one is alpha;
    - a mask whose largest number is 1 is one of zeros and ones, whatever its type.

    Raises ValueError or FileNotFoundError for everything else, in one sentence."""
    if isinstance(source, (str, os.PathLike)):
        source = open_image(source, what)
    if isinstance(source, Tensor):
        if source.ndim not in (2, 3) or source.ndim == 3 and len(source) not in (1, 3, 4):
            raise ValueError(f"the {what} is a tensor of the shape {tuple(source.shape)}: expected (3, H, W)")
        source = source.detach().cpu() if source.ndim == 2 else source.detach().cpu().permute(1, 2, 0)
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        source = from_numbers(source, what, is_mask)
    if isinstance(source, Image.Image):
        return to_rgb(source, background, what, is_mask)
    if not isinstance(source, Tensor):
        raise ValueError(f"the {what} is a {type(source).__name__}: expected a PIL image, a path, an array (H, W, 3) or a "
                         "tensor (3, H, W)")
    return source


def read_each(source: ImageLike | list[ImageLike], what: str = "picture", background: str = "white", is_mask: bool = False
              ) -> list[RGBImage]:
    """One picture, or several: a list, an array (B, H, W, 3) or a tensor (B, 3, H, W)."""
    several = isinstance(source, (list, tuple)) or isinstance(source, (np.ndarray, Tensor)) and source.ndim == 4
    pictures = [read_image(one, what, background, is_mask) for one in (source if several else [source])]
    if not pictures:
        raise ValueError(f"there is no {what}: expected one, or a list of them")
    return pictures


def read_images(source: ImageLike | list[ImageLike], what: str = "picture", background: str = "white", is_mask: bool = False
                  ) -> list[RGBImage]:
    """As `read_each`, but all of one size, since they are worked on together."""
    pictures = read_each(source, what, background, is_mask)
    if len(sizes := {size_of(picture) for picture in pictures}) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:5])
        raise ValueError(f"the {what}s of one call must have one size, got {listed}: resize them, or call once for each")
    return pictures


def size_of(picture: RGBImage) -> tuple[int, int]:
    """(width, height)."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[-1], picture.shape[-2])


# --------------------------------------------------------------------------------------------------------------- sizes


def check_side(name: str, value) -> int:
    """A width or height as a Python number. Raises ValueError for what is none."""
    side = to_number(value, whole=True)
    if side is None or not MULTIPLE <= side <= MAX_SIDE:
        raise ValueError(f"{name} is {quote(value)}: expected a whole number of pixels from {MULTIPLE} to {MAX_SIDE}")
    return side


def floor_side(value: float) -> int:
    """The multiple of 16 below, but a side all the same."""
    return min(max(round(value) // MULTIPLE * MULTIPLE, MULTIPLE), MAX_SIDE)


def round_size(width: int, height: int) -> tuple[int, int]:
    """Both sides rounded down to multiples of 16, which is said once. Raises ValueError for what is no size."""
    width, height = check_side("width", width), check_side("height", height)
    rounded = floor_side(width), floor_side(height)
    if rounded != (width, height):
        log.warning("%d x %d is painted as %d x %d: sides are multiples of %d", width, height, *rounded, MULTIPLE)
    return rounded


def natural_size(like: tuple[int, int], area: int, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """The size to paint in the shape of a picture of (width, height) pixels: about so many pixels, in multiples of 16; where
    the caller gives one side, the other follows from it.

    >>> natural_size((840, 840), 1024**2), natural_size((1232, 1632), 1024**2), natural_size((640, 480), 1024**2, width=512)
    ((1024, 1024), (880, 1168), (512, 384))
    """
    ratio = like[0] / like[1]
    return (width or floor_side(height * ratio if height else (area * ratio) ** 0.5),
            height or floor_side(width / ratio if width else (area / ratio) ** 0.5))


# ------------------------------------------------------------------------------------------------------------- tensors


def to_tensor(picture: RGBImage, width: int, height: int, resample: Image.Resampling = LANCZOS) -> Tensor:
    """(1, 3, H, W) in [0, 1]; where the size differs, resized in 8 bits a channel, as Pillow does."""
    if size_of(picture) != (width, height):
        picture = as_pil(picture).resize((width, height), resample)
    if isinstance(picture, Tensor):
        return picture[None]
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]


def as_pil(picture: RGBImage) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else to_pil(picture[None])[0]


def preprocess(pictures: list[RGBImage], width: int, height: int, resample: Image.Resampling = LANCZOS) -> Tensor:
    """What a network reads: (n, 3, H, W) in [-1, 1]."""
    return torch.cat([to_tensor(picture, width, height, resample) for picture in pictures]) * 2 - 1


def standardise(pixels: Tensor, form: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (x - mean) / deviation of each colour, as a network was trained: CLIP_COLOURS or IMAGENET_COLOURS."""
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in form)
    return (pixels - mean) / deviation


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL pictures."""
    array = pictures.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


# ---------------------------------------------------------------------------------------------------------------- files


def strip(pictures: list[Image.Image]) -> Image.Image:
    """Pictures side by side, all in the size of the first."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((width, height)), (i * width, 0))
    return sheet


def check_output(path: str | os.PathLike, room: int = 0) -> Path:
    """The path, if an image can be written there, and `room` bytes are free; raises ValueError before any work is done."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder: expected the name of a file in it, such as {path / 'image.png'}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the output {path} must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {path.parent} does not exist; create it first")
    try:
        # Note: the only sure way to know whether a file can be written there is to write one.
        probe = partial_path(path)
        probe.write_bytes(bytes(4096))
        probe.unlink()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file is there, and may not be changed")
        free = shutil.disk_usage(path.parent).free
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be written: {reason}") from None
    if free < room:
        raise ValueError(f"{path} cannot be written: {free / 2**20:.0f} MiB are free on the disk, up to {room / 2**20:.0f} are needed")
    return path


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def encodable(value: object) -> str:
    """The text of a value, with escapes for what UTF-8 has no bytes for.

    Note: the name of a file need not be text: caf\\xe9.png from an old archive has a half of a pair in it."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "")


def save(picture: Image.Image, path: Path, metadata: dict[str, object], exif: dict[int, bytes] | None = None) -> None:
    """Write the picture under a temporary name, then rename it; a PNG carries the metadata as text, every format the EXIF tags."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, encodable(value))
    kind, tags = FORMATS[path.suffix.lower()], Image.Exif()
    tags.update(exif or {})
    partial = partial_path(path)
    try:
        how = {"PNG": {"pnginfo": info}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}[kind]
        picture.save(partial, format=kind, **how, **({"exif": tags} if exif else {}))
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def rescue(picture: Image.Image, path: Path, metadata: dict[str, object], exif: dict[int, bytes] | None = None
           ) -> tuple[Path | None, str | None]:
    """Save a picture that has cost much, whatever it takes: without metadata, as a PNG, in the folder for temporary files.

    Returns where it lies now (None: nowhere), and what went wrong (None: nothing)."""
    reason = ""
    png = path.with_suffix(".png")
    tries = [(path, metadata, exif), (path, {}, None)]
    if png != path and not png.exists():
        tries.append((png, {}, None))
    for place, text, tags in tries + [(None, {}, None)]:
        try:
            place = place or Path(tempfile.mkdtemp(prefix="miniflux-")) / png.name
            save(picture, place, text, tags)
        except Exception as error:                          # Pillow's encoders raise what they like
            reason = reason or str(error) or type(error).__name__
            continue
        where = "is written without its metadata" if place == path else f"is in {place}"
        return place, f"{reason}; the picture {where}" if reason else None
    return None, reason


def number(path: Path, i: int, count: int) -> Path:
    """`out.png` for one picture; `out-1.png`, `out-2.png`, ... for several."""
    return path if count == 1 else path.with_name(f"{path.stem}-{i + 1:0{len(str(count))}}{path.suffix}")
