"""The transformer's linear layer and its activation: `nn.Linear` and the tanh GELU in every respect but one.

What a small network does with its few rows on the CPU goes to compiled kernels (csrc/cpu/linear.cpp, gelu.cpp): two thirds of the
time of PyTorch's. Everything else is PyTorch's own."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import native


class Linear(nn.Linear):
    """x Wᵀ + b"""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if native.takes_linear(x, weight, bias):
            return native.linear(x, weight, bias)                               # (..., out_features)
        return F.linear(x, weight, bias)


def tanh_gelu(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))"""
    return native.gelu(x) if native.takes(x) else F.gelu(x, approximate="tanh")


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh_gelu(x)
