"""Provenance: what a picture says of its making, and the command that repeats it.

    miniflux info fox.png

A PNG carries its prompt, seed and settings as text. Every format carries the EXIF marks of the original repository: that it was
generated, by which model, and after which prompt (`--no-metadata` leaves out all but the first two). The watermark, see
`watermark.py`, is looked for too. What a file says is checked and quoted before it is shown as a command: anybody may have written it.

Reference: `save_image` in `src/flux/util.py` of the original repository.
"""

import os
import shlex

from PIL import Image

from ..checkpoints.hub import OFFICIAL
from ..command import Parser, command
from ..settings import DEFAULTS
from .images import to_tensor
from .reading import open_image, to_rgb
from .watermark import MESSAGE, read_watermark

DESCRIPTION, MAKE, MODEL, SOFTWARE = 0x010E, 0x010F, 0x0110, 0x0131
EXIF = {SOFTWARE: "software", MAKE: "make", MODEL: "exif model", DESCRIPTION: "description"}
KINDS = {"generate": "txt2img", "fill": "inpainting", "inpaint": "inpainting", "kontext_inpaint": "inpainting"}
ONCE = ("output", "num_images", "batch", "preview", "preview_with", "quiet", "no_metadata", "shard")  # flags that do not change a picture


def marks(task: str, model: str, prompt: str | None) -> dict[int, bytes]:
    """The EXIF marks of a painted picture."""
    made = {SOFTWARE: f"AI generated;{KINDS.get(task, 'img2img')};flux", MODEL: f"flux-{model}",
            MAKE: "Black Forest Labs" if model in OFFICIAL else "miniflux", DESCRIPTION: prompt}
    # Note: a JPEG has room for 64 KiB of EXIF.
    return {tag: text.encode("utf-8", "backslashreplace")[:60_000] for tag, text in made.items() if text}


def spell(parser, args, seed: int) -> str:
    """The command that paints the picture of this seed alone: the flags that differ from their defaults."""
    words, last = parser.prog.split(), []
    for action in parser._actions:
        value = seed if action.dest == "seed" else getattr(args, action.dest, None)
        if action.dest in ONCE or value is None or value == action.default:
            continue
        texts = [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]
        if not action.option_strings and not texts[0].startswith("-"):
            words[3:3] = texts                              # before all flags: one with several values would take it for another
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
    shown = all(word.replace("\n", "").isprintable() for word in words)
    return shlex.join(words) if words[:2] == ["python", "-m"] and set(words[2:3]) <= tasks and len(words) > 2 and shown else None


def info(picture: str | os.PathLike) -> dict[str, str]:
    """What a picture file says: its texts, its EXIF marks, `watermark` if it has the original's, and `command` if one repeats it.

    Raises FileNotFoundError or ValueError for what is no picture."""
    image = open_image(picture, "picture")
    found = {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    try:
        exif = dict(image.getexif())
    except Exception:                                       # Pillow's reader raises what it likes; the picture itself is sound
        exif = {}
    for tag, name in EXIF.items():
        if isinstance(text := exif.get(tag), str):
            found[name] = text.encode("latin-1", "replace").decode("utf-8", "replace")
    if has_watermark(image):
        found["watermark"] = "of FLUX.1"
    command = command_in(found.pop("command", ""))
    return found | ({"command": command} if command else {})


def has_watermark(image: Image.Image) -> bool:
    width, height = image.size
    if (width // 8) * (height // 8) < len(MESSAGE):
        return False
    try:
        pixels = to_tensor(to_rgb(image, "white", "picture"), width, height)
    except ValueError:                                      # numbers of another range, as in a height map
        return False
    return read_watermark(pixels) == [MESSAGE]


@command
def main() -> None:
    parser = Parser(prog="miniflux info", description="Say what a picture tells of its making.")
    parser.add_argument("picture", help="the picture to look at")
    args = parser.parse_args()
    try:
        found = info(args.picture)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    command = found.pop("command", None)
    for key, value in found.items():
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{key}: {value}"))
    print(f"\nThis paints it again:\n\n{command}" if command else "\nNothing in it says how to paint it again.")


if __name__ == "__main__":
    main()
