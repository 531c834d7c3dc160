"""Pictures on disk and in memory <-> tensors: sizes, conversions, and the text a PNG carries."""

import logging
import math
import os
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

log = logging.getLogger("miniflux")

MULTIPLE = 16              # pixels a side that one token covers: 8 for the autoencoder, 2 for the patch
MAX_SIDE = 16_384
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OUTPUTS = ("pil", "tensor", "latents")


def round_size(width: int, height: int) -> tuple[int, int]:
    """Both sides rounded down to multiples of 16, which is said once. Raises ValueError for what is no size."""
    for name, value in (("width", width), ("height", height)):
        if type(value) is not int or not MULTIPLE <= value <= MAX_SIDE:
            raise ValueError(f"{name} is {value!r}: expected a whole number of pixels from {MULTIPLE} to {MAX_SIDE}")
    rounded = width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE
    if rounded != (width, height):
        log.warning("%d x %d is painted as %d x %d: sides are multiples of %d", width, height, *rounded, MULTIPLE)
    return rounded


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL pictures."""
    array = pictures.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def strip(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * width, 0))
    return sheet


def check_output(path: str | os.PathLike) -> Path:
    """The path, if a picture can be written there; raises ValueError or OSError before any work is done."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the output {path} must end in {', '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: its folder must exist and be writable, and it must not be a folder itself")
    return path


def save(picture: Image.Image, path: Path, metadata: dict[str, object]) -> None:
    """Write the picture under a temporary name, then rename it; a PNG carries the metadata as text."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    kind = FORMATS[path.suffix.lower()]
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(partial, format=kind, **({"pnginfo": info} if kind == "PNG" else {"quality": 95}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def number(path: Path, i: int, count: int) -> Path:
    """`out.png` for one picture; `out-1.png`, `out-2.png`, ... for several."""
    return path if count == 1 else path.with_name(f"{path.stem}-{i + 1:0{len(str(count))}}{path.suffix}")


def check_number(name: str, value, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Raises ValueError unless value is a number (whole if asked for) in [low, high]."""
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} is {value!r}: expected a {'whole ' if whole else ''}number "
                         + (f"of at least {low}" if high == math.inf else f"from {low} to {high}"))
