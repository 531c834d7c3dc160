"""From the facts of a scene to pixels.

    render           the image                       object_masks    where each object is seen
    contact_sheet    images with captions, in rows

    python -m miniflux.tiny.world.rendering --output sheet.png
"""

import random
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from ...command import command
from .glyphs import stamp
from .grounds import IMAGE_SIZE, render_ground
from .scenes import KINDS, Placed, Scene, sample_scene
from .styles import restyle
from .words import ALL_OBJECTS


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: (128, 128, 3) uint8, always the same."""
    image = render_ground(scene.ground, scene.seed)
    for o in scene.layers:
        rgb, alpha = np.split(np.float32(stamp(o.name, o.colour, o.size)), (3,), axis=-1)
        box = image[o.y:o.y + o.size, o.x:o.x + o.size]
        box += alpha / 255 * (rgb - box)
    image = (image.clip(0, 255) + 0.5).astype(np.uint8)
    return restyle(image, scene.style, scene.seed) if scene.style else image


def object_masks(scene: Scene) -> np.ndarray:
    """Where each object is seen, soft edges included: (number of objects, 128, 128) bool."""
    masks: dict[Placed, np.ndarray] = {}
    for o in scene.layers:
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        mask[o.y:o.y + o.size, o.x:o.x + o.size] = stamp(o.name, o.colour, o.size)[..., 3] > 0
        for farther in masks:
            masks[farther] &= ~mask
        masks[o] = mask
    return np.stack([masks[o] for o in scene.objects])


def contact_sheet(images: list[np.ndarray], captions: list[str], columns: int = 8) -> Image.Image:
    """Images in rows, each with its caption printed below."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (IMAGE_SIZE + 8), rows * (IMAGE_SIZE + 44)), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        x = i % columns * (IMAGE_SIZE + 8) + 4
        y = i // columns * (IMAGE_SIZE + 44) + 4
        sheet.paste(Image.fromarray(image), (x, y))
        text = textwrap.fill(caption, 25)
        ImageDraw.Draw(sheet).text((x, y + IMAGE_SIZE + 2), text, fill="black", spacing=1)
    return sheet


def samples(seed: int) -> list[tuple[np.ndarray, str]]:
    """(image, caption) for a sheet of eight columns: a row of each kind of scene, four of edits,
    and two with the data of the other tasks."""
    from .edits import EDITS, sample_edit
    from .pairs import all_of

    rngs = (random.Random(seed + i) for i in range(1000))
    shown = []
    for kind in KINDS:
        scenes = [sample_scene(next(rngs), kind=kind) for _ in range(8)]
        shown += [(render(scene), scene.caption) for scene in scenes]
    for i in range(16):
        before, instruction, after = sample_edit(next(rngs), tuple(EDITS)[i % len(EDITS)])
        shown += [(render(before), before.caption), (render(after), instruction)]
    for kind in ("overlap", "three"):
        shown += all_of(sample_scene(next(rngs), kind=kind), next(rngs))
    return shown


@command
def main(argv: list[str] | None = None) -> None:
    from ...flags import Parser
    from ...imaging.saving import check_output, save

    parser = Parser(prog="python -m miniflux.tiny.world.rendering",
                    description="Draw a sheet of scenes.")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default 0)")
    parser.add_argument("--output", default="sheet.png",
                        help="the image to write (default sheet.png)")
    parser.add_argument("--objects", action="store_true",
                        help="instead one image of each object with its word")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        if args.objects:
            scenes = [Scene((Placed(name, None, 24, 24, 80),), "cyan", name, "single")
                      for name in ALL_OBJECTS]
            shown = [(render(scene), scene.caption) for scene in scenes]
        else:
            shown = samples(args.seed)
        sheet = contact_sheet(*zip(*shown), 12 if args.objects else 8)
        save(sheet, output, {"seed": args.seed})
        print(output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
