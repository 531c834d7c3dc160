"""What the commands share: flags, errors in one line, pictures on disk.

The flags mirror the function's keywords; a flag that is not given leaves the function's own default in place.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import __version__
from .flux import list_models, load
from .images import check_output, number, save, strip
from .settings import DEFAULTS, DISTILLED_STEPS, finish, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")


class ListModels(argparse.Action):
    def __call__(self, parser, *_):
        print("\n".join(list_models()))
        parser.exit()


def parser(task: str, description: str) -> Parser:
    """The flags of all tasks; a task adds its own."""
    p = Parser(prog=f"python -m miniflux.{task}", description=description)
    p.set_defaults(task=task)
    p.add_argument("prompt", help="what to paint")
    p.add_argument("--output", default=f"{task}.png", help=f"the picture to write; several are numbered (default {task}.png)")
    p.add_argument("--model", default="tiny", help="a shipped name, an official short name, a Hub id or a folder (default tiny)")
    p.add_argument("--transformer", help="a single file whose transformer replaces the model's (default: none)")
    p.add_argument("--width", type=int, help="pixels, rounded down to a multiple of 16 (default: the model's)")
    p.add_argument("--height", type=int, help="pixels, rounded down to a multiple of 16 (default: the model's)")
    p.add_argument("--steps", type=int,
                   help=f"steps from noise to picture (default {DEFAULTS[task].steps}; {DISTILLED_STEPS} for schnell)")
    p.add_argument("--guidance", type=float, help=f"how strictly to follow the prompt (default {DEFAULTS[task].guidance})")
    p.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up (default 0)")
    p.add_argument("--num-images", type=int, default=1, help="pictures to paint (default 1)")
    p.add_argument("--negative-prompt", help="what not to paint; acts with --true-cfg above 1 (default: none)")
    p.add_argument("--true-cfg", type=float, default=1.0, help="scale of two-pass guidance (default 1.0: off)")
    p.add_argument("--sigmas", type=float, nargs="+", help="own falling times in (0, 1], not --steps (default: even)")
    p.add_argument("--max-text-tokens", type=int, help="T5 tokens the prompt is padded to (default: the model's)")
    p.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default bfloat16, float32 on the CPU)")
    p.add_argument("--preview", action="store_true", help="also write the picture expected at each step (default: off)")
    p.add_argument("--quiet", action="store_true", help="no progress bar and no notes (default: off)")
    p.add_argument("--list-models", action=ListModels, nargs=0, help="say what is shipped and what is in the cache, and stop")
    p.add_argument("--version", action="version", version=__version__)
    return p


def run(p: Parser, paint: Callable, argv: list[str] | None = None) -> None:
    """Parse, load, paint, save; every mistake of the user ends in one line."""
    args = p.parse_args(argv)
    logging.basicConfig(level=logging.ERROR if args.quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        output = check_output(args.output)
        preview = check_output(os.path.splitext(args.output)[0] + "-preview.png") if args.preview else None
        flux = load(args.model, device=args.device, dtype=DTYPES.get(args.dtype), transformer=args.transformer)
        steps, guidance, width, height = resolve(args.task, flux, args.width, args.height, args.steps, args.guidance, args.seed,
                                                 args.num_images, args.true_cfg, args.sigmas, "latents")
        states: list[tuple[float, Tensor]] = []
        z = paint(flux, args.prompt, width=width, height=height, steps=steps, guidance=guidance, seed=args.seed,
                  num_images=args.num_images, negative_prompt=args.negative_prompt, true_cfg=args.true_cfg, sigmas=args.sigmas,
                  max_text_tokens=args.max_text_tokens, output="latents", progress=not args.quiet,
                  on_step=(lambda step, t, x: states.append((t, x[:1]))) if preview else None)
        metadata = {"prompt": args.prompt, "steps": steps, "guidance": guidance, "model": args.model, "version": __version__}
        for i, picture in enumerate(finish(flux, z, "pil")):
            path = number(output, i, args.num_images)
            save(picture, path, metadata | {"seed": args.seed + i})
            print(path)
        if preview:
            save(strip(finish(flux, estimates(states, z[:1]), "pil")), preview, metadata | {"seed": args.seed})
            print(preview)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        p.error(str(error))


def estimates(states: list[tuple[float, Tensor]], z: Tensor) -> Tensor:
    """Where each step expects the flow to end: x - t·v, with v from the step that followed. Latents (steps, 16, h, w)."""
    states = [*states, (0.0, z)]
    return torch.cat([x - t * (x_next - x) / (t_next - t) for (t, x), (t_next, x_next) in zip(states, states[1:])])
