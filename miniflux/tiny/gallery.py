"""Paints the README's pictures: what the shipped models do, task by task.

    python -m miniflux.tiny.gallery --output gallery.png

Before what a task makes of a picture stands what it was given.
"""

import numpy as np
from PIL import Image, ImageDraw

from ..adapters.controlnet import load_controlnet
from ..adapters.ip_adapter import add_ip_adapter
from ..adapters.lora import add_lora
from ..checkpoints.finding import shipped_models
from ..cli import Parser
from ..command import command
from ..control import control
from ..fill import fill
from ..generate import generate
from ..image_to_image import image_to_image
from ..imaging.canny import canny
from ..imaging.images import check_output, save
from ..inpaint import inpaint
from ..kontext_edit import kontext_edit
from ..loading import load
from ..redux import redux
from .scenes import contact_sheet

PROMPTS = ("a fox on a blue background", "a blue teapot on a yellow background", "two owls at night", "a boat in the sea",
           "a tree on the grass", "pixel art of a penguin")
QUICK = ("a dog on a pink background", "a sunflower in the snow", "a car in the desert", "a penguin on a red background",
         "a crown on a purple background", "a burger on a green background")
NEON = ("a cactus on a black background", "an octopus on a blue background", "a castle on a cyan background", "a car on a brown background",
        "a rocket on a red background", "a flamingo on a gray background")


def depths() -> Image.Image:
    """A ball above a plain that recedes upwards; near is bright."""
    picture = Image.fromarray(np.repeat(np.linspace(30, 150, 128)[:, None], 128, axis=1).astype(np.uint8)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((24, 24, 104, 104), fill=(194,) * 3)
    return picture


def pictures() -> list[tuple[str, np.ndarray]]:
    """(what was done, a picture of 128x128) in the order of the sheet, six in a row."""
    flux, quiet = load("tiny"), dict(progress=False)
    sheet = list(zip(PROMPTS, generate(flux, list(PROMPTS), **quiet)))
    sheet += zip([f"{prompt}, in 4 steps" for prompt in QUICK], generate(load("tiny-schnell"), list(QUICK), **quiet))
    fox, teapot = sheet[0][1], sheet[1][1]
    hole = np.zeros((128, 128), np.uint8)
    hole[16:112, 16:112] = 255
    holed = "given, with a hole", np.where(hole[..., None] > 0, np.uint8(128), np.asarray(fox))
    sheet += [("given", fox), ("image_to_image: a fox on a green background",
                               *image_to_image(flux, "a fox on a green background", fox, strength=0.9, **quiet)),
              holed, ("inpaint: an owl on a blue background",
                      *inpaint(flux, "an owl on a blue background", fox, hole, strength=1.0, **quiet)),
              holed, ("fill: a panda on a blue background", *fill(load("tiny-fill"), "a panda on a blue background", fox, hole, **quiet))]
    steered = load_controlnet("tiny-controlnet"), canny(fox), 1.0, 0.0, 1.0, "canny"
    sheet += [("given: edges", canny(teapot)), ("control: a red teapot on a white background",
                                                *control(load("tiny-canny"), "a red teapot on a white background", canny(teapot), **quiet)),
              ("given: depths", depths()), ("control: a cookie on a pink background",
                                            *control(load("tiny-depth"), "a cookie on a pink background", depths(), **quiet)),
              ("given: edges", canny(fox)), ("a ControlNet: a fox on a red background",
                                             *generate(flux, "a fox on a red background", controlnet=steered, **quiet))]
    kontext, quick = load("tiny-kontext"), sheet[6][1]
    for what, given in (("make the background green", fox), ("turn it into a pencil sketch", quick), ("replace the dog with a cat", quick)):
        sheet += [("given", given), (f"kontext_edit: {what}", *kontext_edit(kontext, what, given, **quiet))]
    reader, follower = load("tiny-redux"), add_ip_adapter(flux, "tiny-ip-adapter")
    for what, given, painted in (("redux", fox, redux(reader, fox, **quiet)), ("redux", quick, redux(reader, quick, **quiet)),
                                 ("an IP-Adapter: a house", teapot, generate(follower, "a house", ip_image=teapot, **quiet))):
        sheet += [("given", given), (what, *painted)]
    sheet += zip([f"a LoRA: {prompt}" for prompt in NEON], generate(add_lora(flux, "tiny-neon"), list(NEON), **quiet))
    return [(what, np.asarray(picture)) for what, picture in sheet]


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.gallery", description="Paint a sheet of what the shipped models do.")
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
