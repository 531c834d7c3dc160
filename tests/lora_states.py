"""Small LoRA files for the tiny model, and what they have changed in it."""

import torch
from safetensors.torch import save_file

H = 192  # hidden size of the tiny model
PROJ = "double_blocks.0.img_attn.proj"
QKV = "double_blocks.0.img_attn.qkv"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
NORM = "double_blocks.0.img_attn.norm.query_norm"


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def pair(rows: int = H, columns: int = H, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(rank, columns), draw(rows, rank)


def file_of(tmp_path, state, name="a.safetensors", **metadata):
    save_file(
        {key: tensor.clone() for key, tensor in state.items()}, tmp_path / name, metadata or None
    )
    return tmp_path / name


def change(flux, changed, module=PROJ, network="mmdit", parameter="weight") -> torch.Tensor:
    """What has been added to a parameter."""
    before, after = (
        getattr(getattr(model, network).get_submodule(module), parameter)
        for model in (flux, changed)
    )
    return after - before


def lora(key: str, a: torch.Tensor, b: torch.Tensor, down="lora_down", up="lora_up"):
    return {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
