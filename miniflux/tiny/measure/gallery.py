"""Paints the README's images: what the shipped models do, task by task.

    python -m miniflux.tiny.measure.gallery --output gallery.png

Each result of a task stands after what the task was given.
"""

import numpy as np
from PIL import Image, ImageDraw

from ...adapters.controlnet import load_controlnet
from ...adapters.ip_adapter import add_ip_adapter
from ...adapters.lora import add_lora
from ...checkpoints.finding import shipped_models
from ...command import command
from ...control import control
from ...fill import fill
from ...flags import Parser
from ...generate import generate
from ...image_to_image import image_to_image
from ...imaging.canny import canny
from ...imaging.saving import check_output, save
from ...inpaint import inpaint
from ...kontext_edit import kontext_edit
from ...loading import load
from ...redux import redux
from ..world.rendering import contact_sheet

PROMPTS = ["a fox on a blue background", "a blue teapot on a yellow background",
           "two owls at night", "a boat in the sea", "a tree on the grass",
           "pixel art of a penguin"]
IN_FOUR_STEPS = ["a dog on a pink background", "a sunflower in the snow", "a car in the desert",
                 "a penguin on a red background", "a crown on a purple background",
                 "a burger on a green background"]
NEON = ["a cactus on a black background", "an octopus on a blue background",
        "a castle on a cyan background", "a car on a brown background",
        "a rocket on a red background", "a flamingo on a gray background"]
QUIET = dict(progress=False)
Row = list[tuple[str, Image.Image]]      # captions and images


def depths() -> Image.Image:
    """A ball above a plain that recedes upwards; near is bright."""
    plain = np.repeat(np.linspace(30, 150, 128)[:, None], 128, axis=1).astype(np.uint8)
    image = Image.fromarray(plain).convert("RGB")
    ImageDraw.Draw(image).ellipse((24, 24, 104, 104), fill=(194, 194, 194))
    return image


def from_text() -> Row:
    row = list(zip(PROMPTS, generate(load("tiny"), PROMPTS, **QUIET)))
    quick = generate(load("tiny-schnell"), IN_FOUR_STEPS, **QUIET)
    return row + list(zip([f"{prompt}, in 4 steps" for prompt in IN_FOUR_STEPS], quick))


def from_image(fox: Image.Image) -> Row:
    flux = load("tiny")
    hole = np.zeros((128, 128), np.uint8)
    hole[16:112, 16:112] = 255
    holed = Image.fromarray(np.where(hole[..., None] > 0, np.uint8(128), np.asarray(fox)))
    green = "a fox on a green background"
    owl = "an owl on a blue background"
    panda = "a panda on a blue background"
    return [
        ("given", fox),
        (f"image_to_image: {green}", *image_to_image(flux, green, fox, strength=0.9, **QUIET)),
        ("given, with a hole", holed),
        (f"inpaint: {owl}", *inpaint(flux, owl, fox, hole, strength=1.0, **QUIET)),
        ("given, with a hole", holed),
        (f"fill: {panda}", *fill(load("tiny-fill"), panda, fox, hole, **QUIET))]


def under_control(fox: Image.Image, teapot: Image.Image) -> Row:
    red = "a red teapot on a white background"
    cookie = "a cookie on a pink background"
    red_fox = "a fox on a red background"
    net = load_controlnet("tiny-controlnet"), canny(fox), 1.0, 0.0, 1.0, "canny"
    return [
        ("given: edges", canny(teapot)),
        (f"control: {red}", *control(load("tiny-canny"), red, canny(teapot), **QUIET)),
        ("given: depths", depths()),
        (f"control: {cookie}", *control(load("tiny-depth"), cookie, depths(), **QUIET)),
        ("given: edges", canny(fox)),
        (f"a ControlNet: {red_fox}", *generate(load("tiny"), red_fox, controlnet=net, **QUIET))]


def by_instruction(fox: Image.Image, dog: Image.Image) -> Row:
    kontext, row = load("tiny-kontext"), []
    edits = (("make the background green", fox), ("turn it into a pencil sketch", dog),
             ("replace the dog with a cat", dog))
    for instruction, given in edits:
        edited, = kontext_edit(kontext, instruction, given, **QUIET)
        row += [("given", given), (f"kontext_edit: {instruction}", edited)]
    return row


def after_image(fox: Image.Image, teapot: Image.Image, dog: Image.Image) -> Row:
    reader, adapted = load("tiny-redux"), add_ip_adapter(load("tiny"), "tiny-ip-adapter")
    row = []
    for given in (fox, dog):
        row += [("given", given), ("redux", *redux(reader, given, **QUIET))]
    house, = generate(adapted, "a house", ip_image=teapot, **QUIET)
    return row + [("given", teapot), ("an IP-Adapter: a house", house)]


def in_neon() -> Row:
    images = generate(add_lora(load("tiny"), "tiny-neon"), NEON, **QUIET)
    return list(zip([f"a LoRA: {prompt}" for prompt in NEON], images))


def gallery() -> Row:
    """The images of the sheet, six in a row."""
    sheet = from_text()
    fox, teapot, dog = (sheet[i][1] for i in (0, 1, len(PROMPTS)))
    return [*sheet, *from_image(fox), *under_control(fox, teapot), *by_instruction(fox, dog),
            *after_image(fox, teapot, dog), *in_neon()]


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.measure.gallery",
                    description="Paint a sheet of what the shipped models do.")
    parser.add_argument("--output", default="gallery.png",
                        help="the image to write (default gallery.png)")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        captions, images = zip(*gallery())
        sheet = contact_sheet([np.asarray(image) for image in images], list(captions), columns=6)
        save(sheet, output, {"models": ", ".join(shipped_models())})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(output)


if __name__ == "__main__":
    main()
