"""Image files: checked before the first step, written whole or not at all, never lost.

    check_output    can an image be written there?
    save            an image and its metadata
    rescue          the same, by whatever means are left
"""

import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..files import atomic_write

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# The most pixels a side.
SIDES = {".png": 2**31 - 1, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}


def check_output(path: str | os.PathLike, room: int = 0) -> Path:
    """The path, if an image can be written there and `room` bytes are free.

    Raises ValueError before any work is done."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder: expected the name of a file in it, "
                         f"such as {path / 'image.png'}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the output {path} must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {path.parent} does not exist; "
                         "create it first")
    try:
        # Note: the only sure test of whether a file can be written there is to write one.
        probe = path.with_name(f".{path.name}.{os.getpid()}.part")
        probe.write_bytes(bytes(4096))
        probe.unlink()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file is there, and may not be changed")
        free = shutil.disk_usage(path.parent).free
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be written: {reason}") from None
    if free < room:
        raise ValueError(f"{path} cannot be written: {free / 2**20:.0f} MiB are free on the disk, "
                         f"up to {room / 2**20:.0f} are needed")
    return path


def save(image: Image.Image, path: Path, metadata: dict[str, object],
         exif: dict[int, bytes] | None = None) -> None:
    """Write an image.

    metadata: text by key, for a PNG.
    exif: bytes by tag, for every format.

    Raises OSError with a sentence that names the path."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, encodable(value))
    tags = Image.Exif()
    tags.update(exif or {})
    kind = FORMATS[path.suffix.lower()]
    options = {
        "PNG": {"pnginfo": info},
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"quality": 95},
    }[kind]
    if exif:
        options["exif"] = tags
    try:
        with atomic_write(path) as partial:
            image.save(partial, format=kind, **options)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def encodable(value: object) -> str:
    r"""The text of a value, with escapes for what UTF-8 has no bytes for.

    Note: the name of a file need not be text. A caf\xe9.png from an old archive reaches Python with
    half of a surrogate pair in its name."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "")


def rescue(image: Image.Image, path: Path, metadata: dict[str, object],
           exif: dict[int, bytes] | None = None) -> tuple[Path | None, str | None]:
    """Save an image that has cost much: without metadata, as a PNG, or in a temporary folder.

    Returns where it is now (None: nowhere), and what went wrong (None: nothing)."""
    png = path.with_suffix(".png")
    attempts = [(path, metadata, exif), (path, {}, None)]
    if png != path and not png.exists():
        attempts.append((png, {}, None))
    reason = None
    for place, text, tags in [*attempts, (None, {}, None)]:
        try:
            place = place or Path(tempfile.mkdtemp(prefix="miniflux-")) / png.name
            save(image, place, text, tags)
        except Exception as error:                          # Pillow's encoders raise what they like
            reason = reason or str(error) or type(error).__name__
            continue
        where = "is written without its metadata" if place == path else f"is in {place}"
        return place, f"{reason}; the image {where}" if reason else None
    return None, reason


def number(path: Path, i: int, count: int) -> Path:
    """`out.png` for one image; `out-1.png`, `out-2.png`, ... for several."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{i + 1:0{len(str(count))}}{path.suffix}")


def strip(images: list[Image.Image]) -> Image.Image:
    """Images side by side, all in the size of the first."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image.resize((width, height)), (i * width, 0))
    return sheet
