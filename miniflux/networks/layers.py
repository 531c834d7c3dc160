"""Small parts that networks share: the linear layer, the activation, the guard of float16.

`native` computes each formula in PyTorch's operations. The few rows of a small network on the CPU
go to compiled kernels (csrc/cpu/layers.cpp): in the tiny model they take two thirds of the time."""

import torch
from torch import Tensor, nn

from . import native


class Linear(nn.Linear):
    """x Wᵀ + b"""

    def forward(self, x: Tensor) -> Tensor:
        return native.linear(x, self.weight, self.bias)                     # (..., out_features)


def tanh_gelu(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))"""
    return native.gelu(x)


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh_gelu(x)


def clamp_fp16(x: Tensor) -> Tensor:
    """Keeps float16 finite (its largest number is 65504); other dtypes pass unchanged."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x
