"""What the transformer does between its attentions: the linear layer, the activation and the norm, each in PyTorch's operations.

What a small network does with its few rows on the CPU goes to compiled kernels of the same names (csrc/cpu/layers.cpp): in the
tiny model they take two thirds of PyTorch's time."""

import torch
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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift; x (B, S, hidden), shift and scale (B, 1, hidden)."""
    if shift.shape == scale.shape == (len(x), 1, x.shape[-1]) and native.takes(x, shift, scale):
        return native.modulate(x, shift, scale)
    # LayerNorm without weights: in this network the conditioning vector supplies scale and shift.
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)
