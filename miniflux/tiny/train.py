"""Trains the tiny FLUX, stage by stage, into a folder that diffusers could have written.

    python -m miniflux.tiny.train vocabulary
    python -m miniflux.tiny.train autoencoder --minutes 14
    python -m miniflux.tiny.train base --minutes 78
    python -m miniflux.tiny.train guidance --minutes 11
    python -m miniflux.tiny.train schnell --minutes 15
    python -m miniflux.tiny.train kontext --minutes 75 --compile
    python -m miniflux.tiny.train fill --minutes 25              canny, depth likewise
    python -m miniflux.tiny.train controlnet --minutes 20
    python -m miniflux.tiny.train style --minutes 8
    python -m miniflux.tiny.train redux --minutes 40             ip-adapter likewise

Everything lies below `--work`: each stage's state, log and sample sheet in its own folder, and in `model/` the model so
far, which `miniflux.load` opens once it is complete. A stage that was interrupted goes on where its last saved state ended.
`torchrun --nproc-per-node N -m miniflux.tiny.train ...` trains with N processes, each on a GPU of its own where there are any.
The emoji font must be installed (see `scenes.py`), and `pip install "miniflux-torch[train]"`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints.finding import whole_models
from ..checkpoints.layouts import load_autoencoder
from ..cli import Parser
from ..command import command
from ..devices import find_device
from ..engine import distributed
from ..loading import load
from ..networks.autoencoder import Autoencoder
from ..tokenizers import CLIPTokenizer, T5Tokenizer
from . import (
    export,
    train_autoencoder,
    train_controlnet,
    train_flow,
    train_ip_adapter,
    train_kontext,
    train_redux,
    train_schnell,
    train_style,
    train_variant,
    vocabulary,
)

SCENES = {"vocabulary": 20_000, "autoencoder": 9_000, "base": 36_000, "guidance": 36_000, "schnell": 4_000, "kontext": 12_000, "style": 3_000,
          "controlnet": 6_000, "redux": 6_000, "ip-adapter": 6_000} | dict.fromkeys(train_variant.VARIANTS, 6_000)


def averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a stage's last state."""
    return {k.removeprefix("ema."): v for k, v in load_file(folder / "state.safetensors").items() if k.startswith("ema.")}


def go_on_alone() -> None:
    """Ends all processes but the first: what is left is to write."""
    if not distributed.is_rank_zero():
        raise SystemExit


def parts(model: Path, device: torch.device) -> tuple[Autoencoder, CLIPTokenizer, T5Tokenizer]:
    """What a painter is trained between: autoencoder and vocabularies."""
    for stage, name in (("vocabulary", "tokenizer_2"), ("autoencoder", "vae")):
        if not (model / name).is_dir():
            raise FileNotFoundError(f"{model / name} does not exist: train the stage {stage} first")
    autoencoder = load_autoencoder(model / "vae", device, torch.float32).to(memory_format=torch.channels_last)
    return autoencoder, CLIPTokenizer.from_folder(model / "tokenizer"), T5Tokenizer.from_folder(model / "tokenizer_2")


def train_autoencoder_stage(work: Path, steps: int | None, minutes: float | None, scenes: int, device: torch.device,
                            start: str | None, decoder_only: bool) -> None:
    known = load(start, device=device, dtype=torch.float32).autoencoder if start else None
    if known and replace(known.config, scale_factor=1.0, shift_factor=0.0) != train_autoencoder.CONFIG:
        raise ValueError(f"the model {start} has another autoencoder than the one that is trained: start with tiny, or a folder of this command's")
    scale, shift = train_autoencoder.run(work / "autoencoder", steps, minutes, device, scenes,
                                         known and known.state_dict(), decoder_only)
    go_on_alone()
    if decoder_only:
        scale, shift = known.config.scale_factor, known.config.shift_factor
    network = Autoencoder(replace(train_autoencoder.CONFIG, scale_factor=scale, shift_factor=shift))
    network.load_state_dict(averaged(work / "autoencoder"))
    export.write_autoencoder(work / "model", network)


def train_painter_stage(work: Path, stage: str, steps: int | None, minutes: float | None, scenes: int,
                        device: torch.device, start: str | None, compiled: bool) -> None:
    if stage == "guidance" and not (work / "base" / "state.safetensors").is_file():
        raise FileNotFoundError(f"{work / 'base'} holds no state: train the stage base first")
    teacher, lr = (averaged(work / "base"), 1e-3) if stage == "guidance" else (None, 2e-3)
    known = load(start, device=device, dtype=torch.float32) if start else None
    train_flow.run(work / stage, parts(work / "model", device), steps, minutes, device, teacher, scenes, lr, known, compiled)
    go_on_alone()
    painter = train_flow.Painter()
    painter.load_state_dict(averaged(work / stage))
    export.write_mmdit(work / "model", painter.mmdit)
    export.write_text_encoders(work / "model", painter.clip, painter.t5)


def train_variant_stage(work: Path, stage: str, steps: int | None, minutes: float | None, scenes: int, device: torch.device,
                        base: str, compiled: bool) -> None:
    """A variant of a model that is there, by default the shipped one."""
    flux, student = (load(base, device=device, dtype=torch.float32) for _ in range(2))
    for mmdit in (flux.mmdit, student.mmdit) if compiled else ():
        mmdit.forward = torch.compile(mmdit.forward)
    if stage == "controlnet":                              # no variant, but a network beside the model
        return train_controlnet.run(work / stage, flux, steps, minutes, scenes, lr=1e-3)
    if stage == "ip-adapter":
        return train_ip_adapter.run(work / stage, flux, steps, minutes, scenes, lr=1e-3)
    if stage == "style":                                   # nor is this: a LoRA that may be added or left
        return train_style.run(work / stage, flux, student, steps, minutes, scenes, lr=2e-3)
    description: dict[str, object] = {"base": base}
    if stage == "schnell":
        train_schnell.run(work / stage, flux, student, steps, minutes, scenes, lr=1e-3)
        description["guidance"] = train_schnell.GUIDANCE
    elif stage == "kontext":
        train_kontext.run(work / stage, flux, student, steps, minutes, scenes, lr=2e-3)
    elif stage == "redux":                                 # the model stays as it is, and learns to read pictures
        train_redux.run(work / stage, flux, steps, minutes, scenes, lr=1e-3)
    else:
        train_variant.run(work / stage, stage, flux, student, steps, minutes, scenes, lr=2e-3)
    go_on_alone()
    vocabulary.write_json(work / stage / "variant.json", description)        # `load` opens the stage's folder


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(SCENES))
    parser.add_argument("--base", default="tiny", choices=whole_models(), help="the model of which schnell, kontext, redux, fill, canny and depth are variants, and for which controlnet, style and ip-adapter are (default tiny)")
    parser.add_argument("--start", help="the model whose weights the stages autoencoder and base begin with (default: random ones)")
    parser.add_argument("--decoder-only", action="store_true", help="autoencoder: keep the encoder of --start, and so its latents")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for so long (default 15)")
    length.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument("--scenes", type=int, help=f"how many scenes to learn from (default {SCENES})")
    parser.add_argument("--work", type=Path, default=Path("tiny-training"), help="the folder of all results (default tiny-training)")
    parser.add_argument("--device", type=find_device, default=find_device(), help="default: CUDA, then MPS, then the CPU")
    parser.add_argument("--compile", action="store_true", help="run the transformer through torch.compile: after two minutes' wait a step takes "
                        "0.7 times as long; needs a C++ compiler")
    args = parser.parse_args(argv)
    for flag in ("minutes", "steps", "scenes"):
        if (value := getattr(args, flag)) is not None and not value > 0:
            parser.error(f"--{flag} is {value}, expected more than 0")
    minutes = args.minutes if args.minutes or args.steps else 15.0
    scenes = args.scenes or SCENES[args.stage]
    if args.start and args.stage not in ("autoencoder", "base"):
        parser.error(f"the stage {args.stage} begins with what the stage before it left: --start is for autoencoder and base")
    if args.decoder_only and not (args.start and args.stage == "autoencoder"):
        parser.error("--decoder-only keeps the encoder of a trained autoencoder: give --start, in the stage autoencoder")
    device = args.device
    try:
        if distributed.is_distributed():
            device = distributed.start(device.type)
        if args.stage == "vocabulary":
            vocabulary.learn(args.work / "model", scenes)
        elif args.stage == "autoencoder":
            train_autoencoder_stage(args.work, args.steps, minutes, scenes, device, args.start, args.decoder_only)
        elif args.stage in ("base", "guidance"):
            train_painter_stage(args.work, args.stage, args.steps, minutes, scenes, device, args.start, args.compile)
        else:
            train_variant_stage(args.work, args.stage, args.steps, minutes, scenes, device, args.base, args.compile)
    except KeyboardInterrupt:
        print(f"stopped; the state is saved: the same command resumes {args.stage}")
        raise SystemExit(130) from None
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
