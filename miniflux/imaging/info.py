"""Provenance: how an image file was made, and the command that repeats it.

    miniflux info fox.png

A PNG carries its prompt, seed and settings as text. Every format carries the EXIF tags of the
original repository: that the image was generated, by which model, and from which prompt
(`--no-metadata` leaves out all but the first two). The watermark, see `watermark.py`, is read too.
Anybody may have written the text of a file, so it is checked and quoted before it is shown as a
command.

Reference: `save_image` in `src/flux/util.py` of the original repository.
"""

import argparse
import os
import shlex

from PIL import Image

from ..checkpoints.hub import OFFICIAL
from ..command import Parser, command, say
from ..settings import DEFAULTS
from .images import to_tensor
from .reading import open_image, to_rgb
from .watermark import MESSAGE, read_watermark

DESCRIPTION = 0x010E
MAKE = 0x010F
MODEL = 0x0110
SOFTWARE = 0x0131
EXIF = {SOFTWARE: "software", MAKE: "make", MODEL: "exif model", DESCRIPTION: "description"}
MAX_EXIF = 60_000          # bytes of a tag; a JPEG has room for 64 KiB of EXIF

# The original repository's words for the tasks; the others are "img2img".
KINDS = {
    "generate": "txt2img",
    "fill": "inpainting",
    "inpaint": "inpainting",
    "kontext_inpaint": "inpainting",
}
# Flags that do not change an image.
ONCE = ("output", "num_images", "batch", "preview", "preview_with", "quiet", "no_metadata", "shard")


def marks(task: str, model: str, prompt: str | None) -> dict[int, bytes]:
    """The EXIF tags of a generated image."""
    tags = {
        SOFTWARE: f"AI generated;{KINDS.get(task, 'img2img')};flux",
        MAKE: "Black Forest Labs" if model in OFFICIAL else "miniflux",
        MODEL: f"flux-{model}",
        DESCRIPTION: prompt,
    }
    return {tag: text.encode("utf-8", "backslashreplace")[:MAX_EXIF] for tag, text in tags.items()
            if text}


def spell(parser: argparse.ArgumentParser, args: argparse.Namespace, seed: int) -> str:
    """The command that paints the image of this seed alone.

    It has the flags that differ from their defaults."""
    words, last = parser.prog.split(), []
    for action in parser._actions:
        value = seed if action.dest == "seed" else getattr(args, action.dest, None)
        if action.dest in ONCE or value is None or value == action.default:
            continue
        is_list = isinstance(value, (list, tuple))
        texts = [str(part) for part in value] if is_list else [str(value)]
        if not action.option_strings and not texts[0].startswith("-"):
            # Note: before all flags, or one with several values would take it for another of them.
            words[3:3] = texts
        elif not action.option_strings:
            last = ["--", *texts]
        elif action.nargs == 0:
            words.append(action.option_strings[0])
        elif len(texts) == 1 and texts[0].startswith("-"):
            words.append(f"{action.option_strings[0]}={texts[0]}")
        else:
            words += [action.option_strings[0], *texts]
    return shlex.join(words + last)


def command_in(text: str) -> str | None:
    """The command, quoted anew, if it is one of miniflux and can be shown in a terminal."""
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    tasks = {f"miniflux.{task}" for task in DEFAULTS}
    is_ours = len(words) > 2 and words[:2] == ["python", "-m"] and words[2] in tasks
    is_printable = all(word.replace("\n", "").isprintable() for word in words)
    return shlex.join(words) if is_ours and is_printable else None


def info(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of an image file.

    Returns its texts, its EXIF tags, `watermark` if it has the original's, and `command` if one
    repeats it.

    Raises FileNotFoundError or ValueError for anything that is no image."""
    image = open_image(path, "image")
    found = {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    try:
        exif = dict(image.getexif())
    except Exception:                                       # Pillow raises what it likes here
        exif = {}
    for tag, name in EXIF.items():
        text = exif.get(tag)
        if isinstance(text, str):
            found[name] = text.encode("latin-1", "replace").decode("utf-8", "replace")
    if has_watermark(image):
        found["watermark"] = "of FLUX.1"
    command = command_in(found.pop("command", ""))
    if command:
        found["command"] = command
    return found


def has_watermark(image: Image.Image) -> bool:
    width, height = image.size
    if (width // 8) * (height // 8) < len(MESSAGE):
        return False
    try:
        pixels = to_tensor(to_rgb(image, "white", "image"), width, height)
    except ValueError:                                      # numbers of another range: a height map
        return False
    return read_watermark(pixels) == [MESSAGE]


@command
def main() -> None:
    parser = Parser(prog="miniflux info", description="Show how an image was made.")
    parser.add_argument("image", help="the image to read")
    args = parser.parse_args()
    try:
        found = info(args.image)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    command = found.pop("command", None)
    for key, value in found.items():
        say("".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{key}: {value}"))
    if command:
        say(f"\nThis paints it again:\n\n{command}")
    else:
        say("\nIt holds no command that paints it again.")


if __name__ == "__main__":
    main()
