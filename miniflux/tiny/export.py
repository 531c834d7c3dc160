"""Trained networks -> the diffusers folder layout: official class names and configs, in bfloat16.

    python -m miniflux.tiny.export tiny-fill --output tiny-fill

writes a variant as a whole model: its LoRA merged, with all parts. What is written here, diffusers
and transformers load too.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ..adapters.ip_adapter import IPAdapter
from ..checkpoints import saving
from ..checkpoints.finding import shipped_models
from ..checkpoints.saving import write_part, write_tensors
from ..command import command
from ..flags import Parser
from ..flux import Flux
from ..loading import load
from ..networks.clip import CLIPVision, CLIPVisionConfig

# The parts of a training's model, in bfloat16.
write_mmdit = partial(saving.write_mmdit, dtype=torch.bfloat16)
write_autoencoder = partial(saving.write_autoencoder, dtype=torch.bfloat16)
write_controlnet = partial(saving.write_controlnet, dtype=torch.bfloat16)
write_text_encoders = partial(saving.write_text_encoders, dtype=torch.bfloat16)
write_redux = partial(saving.write_redux, dtype=torch.bfloat16)


def clip_vision_json(c: CLIPVisionConfig) -> dict:
    return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
            "num_channels": 3, "attention_dropout": 0.0} | asdict(c)


def write_ip_adapter(folder: Path, clip: CLIPVision, adapter: IPAdapter) -> None:
    """`image_encoder/`, and beside it `ip_adapter.safetensors` with XLabs' names."""
    write_part(folder / "image_encoder", clip_vision_json(clip.config), "model",
               clip.state_dict(), torch.bfloat16)
    state = {f"ip_adapter_proj_model.{name}": value
             for name, value in adapter.projection.state_dict().items()}
    for name, value in adapter.double_blocks.state_dict().items():              # 0.k_proj.weight
        block, layer, kind = name.split(".")
        processor = f"double_blocks.{block}.processor.ip_adapter_double_stream"
        state[f"{processor}_{layer}.{kind}"] = value
    write_tensors(folder / "ip_adapter.safetensors", state, torch.bfloat16)


def write_model(folder: Path, flux: Flux) -> None:
    """All parts of a shipped model, or of a variant of it, as `load` made it."""
    saving.save(flux, folder, torch.bfloat16)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.export",
                    description="Write a shipped model as a whole folder in the diffusers layout.")
    parser.add_argument("model", choices=list(shipped_models()), help="a shipped name")
    parser.add_argument("--output", type=Path, required=True,
                        help="the folder to write, which must not exist yet (required)")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} exists already: give another folder")
        write_model(args.output, load(args.model, device="cpu"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(args.output)


if __name__ == "__main__":
    main()
