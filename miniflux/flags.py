"""The flags of the tasks, and errors in terms of flags.

A flag mirrors the keyword of its name. A flag that is not given leaves the default to the function.
"""

import argparse
from typing import NoReturn

from . import __version__, command
from .adapters.controlnet import MODES
from .checkpoints.finding import list_models
from .command import say
from .devices import DTYPES
from .engine import distributed
from .engine.caching import METHODS
from .engine.offload import MODES as OFFLOAD_MODES
from .engine.quantize import FORMATS
from .flux import SCHEDULES
from .sampling import SAMPLERS
from .settings import DEFAULTS, DISTILLED_STEPS, MAX_SEED

# Flags that only some tasks have.
ELSEWHERE = {
    "--image": "image_to_image, inpaint, fill, control, redux, kontext_edit and kontext_inpaint",
    "--strength": "image_to_image, inpaint, fill, control and kontext_inpaint",
    "--mask": "inpaint, fill, control and kontext_inpaint",
    "--expand": "fill",
    "--paste-back": "fill",
    "--canny": "control",
    "--depth": "control",
    "--reference": "kontext_inpaint",
    "--controlnet": "generate, image_to_image and inpaint",
    "--ip-adapter": "generate, image_to_image, inpaint, kontext_edit and kontext_inpaint",
}

# Advice in errors of the functions -> advice that a command line can follow.
ADVICE = {
    "strict=False leaves them out": "--lora-lenient leaves them out",
    'ask for output="latents", or add vae/': "add vae/",
    "pass an encoded Prompt, or add": "add",
    'load("redux"), or add it with add_redux(flux, source)':
        "choose one that has, such as --model tiny-redux or --model redux",
    ", and call start() in each of them": "",
    "give image= too": "give --image too",
    "the mode is ": "--control-mode is ",
    "leave the mode out": "leave --control-mode out, or give none for this net",
    "max_text_tokens is": "--max-text-tokens is",
    "as image_encoder=": "as --image-encoder",
}


class Parser(command.Parser):
    """Of several processes, only the first to fail prints the reason."""

    def error(self, message: str) -> NoReturn:
        if not distributed.is_first_to_fail():
            self.exit(2)
        for python, shell in ADVICE.items():
            message = message.replace(python, shell)
        super().error(message)


class TaskParser(Parser):
    """The parser of a task; it names the tasks that take a flag."""

    def describe(self, unknown: list[str]) -> str:
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if flag in ELSEWHERE:
            task = self.prog.rpartition(".")[2]
            return f"{task} takes no {flag}: that is a flag of {ELSEWHERE[flag]}"
        return super().describe(unknown)


class ListModels(argparse.Action):
    def __call__(self, parser, *_):
        say("\n".join(list_models()))
        parser.exit()


# ------------------------------------------------------------------------------- of all tasks


def parser(task: str, description: str, prompt: bool = True) -> TaskParser:
    """The flags of all tasks; a task adds its own."""
    p = TaskParser(prog=f"python -m miniflux.{task}", description=description)
    if prompt:
        p.add_argument("prompt", help="what to paint")
    add_image_flags(p, task)
    add_model_flags(p)
    add_speed_flags(p)
    add_output_flags(p, task)
    p.shared = {action.dest for action in p._actions}
    return p


def add_image_flags(p: Parser, task: str) -> None:
    shape = "the image's shape, at the model's number of pixels"
    if task in ("generate", "redux"):
        shape = "the model's"
    defaults = DEFAULTS[task]
    group = p.add_argument_group("the image")
    group.add_argument("--width", type=int, metavar="PIXELS",
                       help=f"rounded down to a multiple of 16 (default: {shape})")
    group.add_argument("--height", type=int, metavar="PIXELS",
                       help=f"rounded down to a multiple of 16 (default: {shape})")
    group.add_argument("--steps", type=int,
                       help=f"steps from noise to image (default {defaults.steps}; "
                       f"{DISTILLED_STEPS} for schnell)")
    group.add_argument("--guidance", type=float,
                       help=f"how strictly to follow the prompt (default {defaults.guidance})")
    group.add_argument("--seed", type=seed, default=0,
                       help="of the first image; the next ones count up (default 0)")
    group.add_argument("--num-images", type=int, default=1, help="images to paint (default 1)")
    group.add_argument("--batch", type=int,
                       help="images to paint at once; more need more memory, and share the cost of "
                       "--offload (default 1)")
    group.add_argument("--negative-prompt",
                       help="what not to paint; acts with --true-cfg above 1 (default: none)")
    group.add_argument("--true-cfg", type=float, default=1.0,
                       help="scale of two-pass guidance (default 1.0: off)")
    group.add_argument("--sigmas", type=float, nargs="+",
                       help="own falling times in (0, 1], not --steps (default: even)")
    group.add_argument("--sampler", choices=SAMPLERS,
                       help="euler, or heun: second order, two passes a step (default euler)")
    group.add_argument("--max-text-tokens", type=int,
                       help="T5 tokens the prompt is padded to (default: the model's)")


def add_model_flags(p: Parser) -> None:
    group = p.add_argument_group("the model")
    group.add_argument("--model", default="tiny",
                       help="a shipped name, an official short name, a Hub id or a folder "
                       "(default tiny)")
    group.add_argument("--transformer",
                       help="a single file whose transformer replaces the model's (default: none)")
    group.add_argument("--schedule", choices=list(SCHEDULES),
                       help="how the times are spaced (default: as the model's folder asks for)")
    group.add_argument("--quantize", choices=FORMATS,
                       help="weights in fewer bits (default: as they are)")
    group.add_argument("--lora", nargs="+", default=[], metavar="FILE",
                       help="LoRAs to add: files, folders, Hub ids or shipped names "
                       "(default: none)")
    group.add_argument("--lora-scales", type=float, nargs="+", metavar="SCALE",
                       help="how strongly each of them acts (default: 1)")
    group.add_argument("--lora-lenient", action="store_true",
                       help="leave out parts of a LoRA that belong nowhere in this model "
                       "(default: stop there)")
    group.add_argument("--list-models", action=ListModels, nargs=0,
                       help="list shipped and cached models, and stop")


def add_speed_flags(p: Parser) -> None:
    group = p.add_argument_group("memory and speed")
    threshold, interval = METHODS["first_block"]["threshold"], METHODS["taylor"]["interval"]
    group.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    group.add_argument("--dtype", choices=DTYPES,
                       help="of the weights (default bfloat16, float32 on the CPU)")
    group.add_argument("--offload", choices=OFFLOAD_MODES,
                       help="load parts of the model to the device in turn (default: all at once)")
    group.add_argument("--cache", choices=METHODS,
                       help="compute only some of the steps in full (default: off)")
    group.add_argument("--cache-threshold", type=float,
                       help="change of the first block up to which a step is not computed "
                       f"(default {threshold})")
    group.add_argument("--cache-interval", type=int,
                       help=f"of the computed steps of --cache taylor (default {interval})")
    group.add_argument("--tile", type=int, metavar="PIXELS",
                       help="encode and decode images in tiles of this size (default: as a whole)")
    group.add_argument("--compile", action="store_true",
                       help="compile the transformer's blocks, which takes a minute (default: off)")
    group.add_argument("--shard", action="store_true",
                       help="with torchrun: each process keeps only its share of the weights "
                       "(default: off)")


def add_output_flags(p: Parser, task: str) -> None:
    group = p.add_argument_group("the output")
    group.add_argument("--output", default=f"{task}.png",
                       help=f"the image to write; several are numbered (default {task}.png)")
    group.add_argument("--preview", action="store_true",
                       help="also write the image expected at each step (default: off)")
    group.add_argument("--preview-with", metavar="FILE",
                       help="the same without decoding, by a map of `miniflux preview` or TAEF1 "
                       "(default: off)")
    group.add_argument("--safety", nargs="+", metavar="FILTER",
                       help="stop images that this classifier flags, such as "
                       "Falconsai/nsfw_image_detection, or that a Pixtral named after it flags, "
                       "and its prompts (default: no filter)")
    group.add_argument("--watermark", action="store_true",
                       help="hide the original's invisible watermark in the image (default: off)")
    group.add_argument("--no-metadata", action="store_true",
                       help="write into the image only that it is generated, and by which model "
                       "(default: also the prompt and all settings)")
    group.add_argument("--quiet", action="store_true",
                       help="no progress bar and no notes (default: off)")
    group.add_argument("--version", action="version", version=__version__)


def seed(text: str) -> int:
    """A whole number.

    Other programs draw one for "random" or -1. Here an image can always be painted again."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no seed: expected a whole number from 0 to {MAX_SEED} "
            "(for another image each time, draw one yourself: --seed $RANDOM)")
    return number


# ------------------------------------------------------------------------------ of some tasks


def add_strength(p: Parser, default: float) -> None:
    p.add_argument("--strength", type=float, default=default,
                   help=f"how far back to noise, in (0, 1] (default {default})")


def add_image_and_mask(p: Parser, expand: bool = False) -> None:
    """Of the tasks that repaint a part of an image; `cli.image_and_mask` reads them."""
    p.add_argument("--image", required=True, help="the image (required)")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--mask", help="white where the image is to be repainted")
    source.add_argument("--mask-from-alpha", action="store_true",
                        help="use the image's transparent part as the mask")
    if expand:
        source.add_argument("--expand", type=int, nargs=4,
                            metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                            help="paint beyond the image's edges, so many pixels on each side")
    p.add_argument("--mask-blur", type=float, default=0.0, metavar="PIXELS",
                   help="by how much the mask's edge is blurred (default 0.0)")
    if not expand:
        p.add_argument("--mask-padding", type=int, metavar="PIXELS",
                       help="paint only the mask's surroundings, so much wider, enlarged "
                       "(default: the whole image)")


def add_controls(p: Parser) -> None:
    """Of the tasks that take ControlNets; `cli.controls` reads them."""
    p.add_argument("--controlnet", nargs="+", metavar="NET",
                   help="ControlNets: files, folders, Hub ids or shipped names (default: none)")
    p.add_argument("--control-image", nargs="+", metavar="IMAGE",
                   help="the control image of each of them")
    p.add_argument("--control-scale", nargs="+", type=float, metavar="SCALE",
                   help="how strongly each of them acts (default 1.0)")
    p.add_argument("--control-start", nargs="+", type=float, metavar="PART",
                   help="from which part of the steps on (default 0.0)")
    p.add_argument("--control-end", nargs="+", type=float, metavar="PART",
                   help="until which part of the steps (default 1.0)")
    p.add_argument("--control-mode", nargs="+", metavar="KIND",
                   help=f"of control, for union nets: {', '.join(MODES)}, a number, or none for "
                   "another net")


def add_ip_images(p: Parser) -> None:
    """Of the tasks that take IP-Adapters."""
    p.add_argument("--ip-adapter", nargs="+", metavar="FILE",
                   help="IP-Adapters to add: files, folders, Hub ids or shipped names "
                   "(default: none)")
    p.add_argument("--ip-image", nargs="+", metavar="IMAGE",
                   help="the image that each of them follows")
    p.add_argument("--ip-scale", nargs="+", type=float, metavar="SCALE",
                   help="how strongly each of them acts (default 1.0)")
    p.add_argument("--negative-ip-image", nargs="+", metavar="IMAGE",
                   help="what they avoid; acts with --true-cfg (default: black)")
    p.add_argument("--image-encoder",
                   help="the folder or Hub id of CLIP's vision tower (default: beside the "
                   "IP-Adapter, or the cached one)")


def add_auto_resize(p: Parser) -> None:
    p.add_argument("--no-auto-resize", dest="auto_resize", action="store_false",
                   help="give the model the image in its own size (default: in the nearest shape "
                   "it was trained on)")
