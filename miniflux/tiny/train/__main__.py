"""Trains the tiny FLUX, stage by stage, into a folder that diffusers could have written.

    python -m miniflux.tiny.train vocabulary
    python -m miniflux.tiny.train autoencoder --minutes 120
    python -m miniflux.tiny.train base --minutes 600 --compile
    python -m miniflux.tiny.train guidance --minutes 60
    python -m miniflux.tiny.train schnell --minutes 30
    python -m miniflux.tiny.train kontext --minutes 120 --compile
    python -m miniflux.tiny.train fill --minutes 45              canny, depth likewise
    python -m miniflux.tiny.train controlnet --minutes 60
    python -m miniflux.tiny.train style --minutes 10
    python -m miniflux.tiny.train redux --minutes 60             ip-adapter likewise
    python -m miniflux.tiny.train status                         how far each stage is

Everything lies below `--work`: each stage's state, log and sample sheet in its own folder, and in
`model/` the model so far, which `miniflux.load` opens once it is complete. `--minutes` counts the
training over all restarts: a stage that was stopped, by Ctrl-C or otherwise, goes on where its last
saved state ended. `base --start tiny` needs no stage before it.

`torchrun --nproc-per-node N -m miniflux.tiny.train ...` trains with N processes, each on a GPU of
its own where there are any. The emoji font must be installed (see `world/glyphs.py`), and
`pip install "miniflux-torch[train]"`.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoints.configs import WORD_LIST
from ...checkpoints.finding import find_source, whole_models
from ...checkpoints.layouts import load_autoencoder
from ...checkpoints.saving import write_json
from ...command import command
from ...devices import find_device
from ...engine import distributed
from ...flags import Parser
from ...loading import load
from ...networks.autoencoder import Autoencoder
from ...tokenizers import CLIPTokenizer, T5Tokenizer
from .. import export
from ..world import vocabulary
from . import (
    autoencoder,
    base,
    controlnet,
    guidance,
    ip_adapter,
    kontext,
    redux,
    schnell,
    status,
    style,
    variant,
)

SCENES = {                               # stage: the scenes that it learns from
    "vocabulary": 20_000, "autoencoder": 9_000, "base": 36_000, "guidance": 36_000,
    "schnell": 4_000, "kontext": 12_000, "style": 3_000, "controlnet": 6_000, "redux": 6_000,
    "ip-adapter": 6_000, "fill": 6_000, "canny": 6_000, "depth": 6_000}
DEFAULT_MINUTES = 15.0
Length = dict[str, float | int | None]   # steps or minutes


def averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a stage's last state."""
    state = load_file(folder / "state.safetensors")
    return {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}


def end_other_processes() -> None:
    """All processes but the first end here: what is left is to write."""
    if not distributed.is_rank_zero():
        raise SystemExit


def copy_parts(start: str, model: Path) -> None:
    """Copy the autoencoder and the vocabularies of the model `start`, where the folder has none."""
    source = find_source(start)
    for part in ("vae", "tokenizer", "tokenizer_2"):
        if not (model / part).is_dir() and (source / part).is_dir():
            shutil.copytree(source / part, model / part)
    words = source / WORD_LIST
    if words.is_file() and not (model / words.name).is_file():
        shutil.copy(words, model / words.name)


def load_parts(model: Path, device: torch.device) -> base.Parts:
    """The autoencoder and the vocabularies in the folder of a model."""
    for stage, name in (("vocabulary", "tokenizer_2"), ("autoencoder", "vae")):
        if not (model / name).is_dir():
            raise FileNotFoundError(f"{model / name} does not exist: train the stage {stage} first,"
                                    " or begin with the parts of a model by --start")
    network = load_autoencoder(model / "vae", device, torch.float32)
    return base.Parts(network, CLIPTokenizer.from_folder(model / "tokenizer"),
                      T5Tokenizer.from_folder(model / "tokenizer_2"))


def train_autoencoder(args: argparse.Namespace, length: Length) -> None:
    known = None
    if args.start:
        known = load(args.start, device=args.device, dtype=torch.float32).autoencoder
        if replace(known.config, scale_factor=1.0, shift_factor=0.0) != autoencoder.CONFIG:
            raise ValueError(f"the model {args.start} has another autoencoder than the one that is "
                             "trained: start with tiny, or a folder of this command's")
    folder = args.work / "autoencoder"
    scale, shift = autoencoder.run(folder, args.device, args.scenes, known and known.state_dict(),
                                   args.decoder_only, **length)
    end_other_processes()
    if args.decoder_only:
        scale, shift = known.config.scale_factor, known.config.shift_factor
    config = replace(autoencoder.CONFIG, scale_factor=scale, shift_factor=shift)
    network = Autoencoder(config)
    network.load_state_dict(averaged(folder))
    export.write_autoencoder(args.work / "model", network)


def train_joint_model(args: argparse.Namespace, length: Length) -> None:
    """The stages base and guidance."""
    model, folder = args.work / "model", args.work / args.stage
    state = args.work / "base" / "state.safetensors"
    if args.stage == "guidance" and not state.is_file():
        raise FileNotFoundError(f"{state.parent} holds no state: train the stage base first")
    start = None
    if args.start:
        start = load(args.start, device=args.device, dtype=torch.float32)
        copy_parts(args.start, model)
    parts = load_parts(model, args.device)
    if args.stage == "base":
        base.run(folder, parts, args.device, args.scenes, start=start, compiled=args.compile,
                 **length)
    else:
        guidance.run(folder, parts, args.device, args.scenes, averaged(state.parent),
                     compiled=args.compile, **length)
    end_other_processes()
    network = base.JointModel()
    network.load_state_dict(averaged(folder))
    export.write_mmdit(model, network.mmdit)
    export.write_text_encoders(model, network.clip, network.t5)


def train_addition(args: argparse.Namespace, length: Length) -> None:
    """A stage that adds to a finished model, by default the shipped one."""
    stage, folder = args.stage, args.work / args.stage
    flux = load(args.base, device=args.device, dtype=torch.float32)
    if stage in ("controlnet", "ip-adapter", "redux"):              # the model stays as it is
        student = None
    else:                                                           # a copy of it learns
        student = load(args.base, device=args.device, dtype=torch.float32)
    if args.compile:
        for model in filter(None, (flux, student)):
            base.compile_blocks(model.mmdit)
    if student is None:
        file = {"controlnet": controlnet, "ip-adapter": ip_adapter, "redux": redux}[stage]
        file.run(folder, flux, args.scenes, **length)
    elif stage in variant.VARIANTS:
        variant.run(folder, stage, flux, student, args.scenes, **length)
    else:
        file = {"schnell": schnell, "kontext": kontext, "style": style}[stage]
        file.run(folder, flux, student, args.scenes, **length)
    end_other_processes()
    if stage in ("controlnet", "ip-adapter", "style"):  # files of their own, no variants
        return
    description: dict[str, object] = {"base": args.base}
    if stage == "schnell":
        description["guidance"] = schnell.GUIDANCE
    write_json(folder / "variant.json", description)     # `load` opens the folder


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m miniflux.tiny.train", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=[*SCENES, "status"], help="what to train; status: how far each stage is")
    add("--base", default="tiny", choices=whole_models(),
        help="the finished model to which the stages from schnell on add (default tiny)")
    add("--start", help="autoencoder, base: begin with the weights of this model (default: random)")
    add("--decoder-only", action="store_true",
        help="autoencoder: keep the encoder of --start, and so its latents")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float,
                        help=f"of training, over all restarts (default {DEFAULT_MINUTES:g})")
    length.add_argument("--steps", type=int, help="train for so many steps")
    add("--scenes", type=int, help=f"how many scenes to learn from (default {SCENES})")
    add("--work", type=Path, default=Path("tiny-training"),
        help="the folder of all results (default tiny-training)")
    add("--device", type=find_device, default=find_device(),
        help="default: CUDA, then MPS, then the CPU")
    add("--compile", action="store_true",
        help="compile the transformer's blocks: a step takes less time after a minute's wait; "
             "needs a C++ compiler")
    args = parser.parse_args(argv)
    for flag in ("minutes", "steps", "scenes"):
        if (value := getattr(args, flag)) is not None and not value > 0:
            parser.error(f"--{flag} is {value}, expected more than 0")
    if args.start and args.stage not in ("autoencoder", "base"):
        parser.error(f"the stage {args.stage} begins with the result of the stage before it: "
                     "--start is for autoencoder and base")
    if args.decoder_only and not (args.start and args.stage == "autoencoder"):
        parser.error("--decoder-only keeps a trained encoder: use it in the stage autoencoder, "
                     "with --start")
    args.minutes = args.minutes if args.minutes or args.steps else DEFAULT_MINUTES
    args.scenes = args.scenes or SCENES.get(args.stage)
    args.error = parser.error
    return args


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        if args.stage == "status":
            return status.show(args.work)
        if distributed.is_distributed():
            args.device = distributed.start(args.device.type)
        length = {"steps": args.steps, "minutes": args.minutes}
        if args.stage == "vocabulary":
            return vocabulary.learn(args.work / "model", args.scenes)
        if distributed.is_rank_zero():
            status.write_run(args.work / args.stage, argv, args.minutes, args.steps)
        if args.stage == "autoencoder":
            train_autoencoder(args, length)
        elif args.stage in ("base", "guidance"):
            train_joint_model(args, length)
        else:
            train_addition(args, length)
    except KeyboardInterrupt:
        line = status.describe_stage(args.work / args.stage)
        raise KeyboardInterrupt(f"stopped, the state is saved; {line}") from None
    except (OSError, ValueError, ImportError) as error:
        args.error(str(error))


if __name__ == "__main__":
    main()
