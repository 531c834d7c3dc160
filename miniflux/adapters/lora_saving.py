"""The writer of LoRA files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.names import SWAPPED_HALVES, count, mmdit_modules, swap_halves
from ..files import atomic_write

Factors = Mapping[str, tuple[Tensor, Tensor]]


def save_lora(path: Path, factors: Factors, *, diffusers: bool = False,
              dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a LoRA, to a temporary name first.

    factors: module of ours -> A (rank, in) and B (out, rank); B A is the change of its weight.
    diffusers: whether the names are those of diffusers, where a fused layer becomes several that
    share A; else they are the original ones.
    dtype: of the numbers in the file."""
    pairs = in_diffusers_names(factors) if diffusers else factors
    state = {}
    for name, (A, B) in pairs.items():
        state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    state = {name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
             for name, tensor in state.items()}
    with atomic_write(path) as partial:
        save_file(state, partial)


def in_diffusers_names(factors: Factors) -> Factors:
    """The same changes under the names of diffusers' pipelines."""
    names = set(factors)
    modules = mmdit_modules(count(names, "double_blocks"), count(names, "single_blocks"))
    result = {}
    for name, (A, B) in factors.items():
        if name not in modules:                             # a text encoder's: one name for both
            result[name] = A, B
            continue
        B = swap_halves(B) if name == SWAPPED_HALVES else B
        hidden, parts = A.shape[1], modules[name]           # q, k and v have `hidden` rows each
        pieces = B.tensor_split([hidden * i for i in range(1, len(parts))])
        result |= {f"transformer.{part}": (A, piece) for part, piece in zip(parts, pieces)}
    return result
