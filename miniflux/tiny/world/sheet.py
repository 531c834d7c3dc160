"""The command that draws a sheet of scenes: what the small models are taught.

    miniflux tiny scenes --output sheet.png
"""

import random

import numpy as np

from ...command import command
from ...flags import Parser
from ...imaging.saving import check_output, save
from .edits import EDITS, sample_edit
from .pairs import all_of
from .rendering import contact_sheet, render
from .scenes import KINDS, Placed, Scene, sample_scene
from .words import ALL_OBJECTS


def samples(seed: int) -> list[tuple[np.ndarray, str]]:
    """(image, caption) for a sheet of eight columns: a row of each kind of scene, four of edits,
    and two with the data of the other tasks."""
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
    parser = Parser(prog="miniflux tiny scenes", description="Draw a sheet of scenes.")
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
