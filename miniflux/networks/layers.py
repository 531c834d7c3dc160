"""Small parts that networks share: the linear layer, the activation, the guard of float16.

On the CPU, the few rows of a small network go to compiled kernels of the same names
(csrc/cpu/layers.cpp): in the tiny model they take two thirds of PyTorch's time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import native


class Linear(nn.Linear):
    """x Wᵀ + b"""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if native.takes_linear(x, weight, bias):
            return native.linear(x, weight, bias)                           # (..., out_features)
        return F.linear(x, weight, bias)


def tanh_gelu(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))"""
    return native.gelu(x) if native.takes(x) else F.gelu(x, approximate="tanh")


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh_gelu(x)


def clamp_fp16(x: Tensor) -> Tensor:
    """Keeps float16 finite (its largest number is 65504); other dtypes pass unchanged."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x
