"""Paints the README's pictures: every task, by the shipped models alone.

    python -m miniflux.tiny.gallery --output gallery.png

Before what a task makes of a picture stands what it was given.
"""

import numpy as np

from ..canny import canny
from ..cli import Parser
from ..control import control
from ..flux import load, shipped_models
from ..generate import generate
from ..image_to_image import image_to_image
from ..images import check_output, save
from ..inpaint import inpaint
from .scenes import contact_sheet

PROMPTS = ("a fox on a blue background", "a blue teapot on a yellow background", "two owls at night", "a cat to the left of a red apple",
           "a boat in the sea", "a tree on the grass", "two bees on a white background", "a small cat on a pink background")
QUICK = ("a dog on a pink background", "a sunflower in the snow", "a car in the desert", "a penguin on a red background")


def pictures() -> list[tuple[str, np.ndarray]]:
    """(what was done, a picture of 128x128) in the order of the sheet."""
    flux, quiet = load("tiny"), dict(progress=False)
    sheet = list(zip(PROMPTS, generate(flux, list(PROMPTS), **quiet)))
    if "tiny-schnell" in shipped_models():
        sheet += zip([f"{prompt}, in 4 steps" for prompt in QUICK], generate(load("tiny-schnell"), list(QUICK), **quiet))
    fox = sheet[0][1]
    sheet += [("given", fox), ("image_to_image: a fox on a green background",
                               *image_to_image(flux, "a fox on a green background", fox, strength=0.9, **quiet))]
    hole = np.zeros((128, 128), np.uint8)
    hole[16:112, 16:112] = 255
    sheet += [("given, with a hole", np.where(hole[..., None] > 0, np.uint8(128), np.asarray(fox))),
              ("inpaint: an owl on a blue background", *inpaint(flux, "an owl on a blue background", fox, hole, strength=1.0, **quiet))]
    edges = canny(sheet[1][1])
    sheet += [("given: edges", edges), ("control: a red teapot on a white background",
                                        *control(load("tiny-canny"), "a red teapot on a white background", edges, **quiet))]
    return [(what, np.asarray(picture)) for what, picture in sheet]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.gallery", description="Paint a sheet of every task with the shipped models.")
    parser.add_argument("--output", default="gallery.png", help="the picture to write (default gallery.png)")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        captions, painted = zip(*pictures())
        save(contact_sheet(list(painted), list(captions), columns=6), output, {"models": ", ".join(shipped_models())})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(output)


if __name__ == "__main__":
    main()
