"""The two optimizers of every stage: Muon for the matrices inside the networks, AdamW for the rest.

    m = 0.95 m + 0.05 g
    u = orthogonalise(0.05 g + 0.95 m)
    W = W - lr · 0.2 sqrt(max(rows, columns)) · u

Muon (Jordan et al. 2024): the step of a matrix has all its singular values near 1, so that no
direction is neglected. The factor makes the step as large as AdamW's (Liu et al. 2025,
arXiv:2502.16982), and one learning rate does for both.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)        # a, b, c of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X
NOT_INNER = ("embed", "shared", "_bias", "img_in", "final_layer.linear", "conv_in",
             "decoder.conv_out")


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(n, r, c) -> the same singular vectors, all singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT                                                         # (n, r, r)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. A convolution counts as the matrix
    (out, in·k·k). All matrices of one shape are orthogonalised in one batch."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.flatten(1).shape].append(p)
            for (rows, columns), params in by_shape.items():
                updates = orthogonalise(torch.stack([self._momentum(p) for p in params]))
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.view_as(p), alpha=scale)

    def _momentum(self, p: nn.Parameter) -> Tensor:
        """The gradient averaged with those before it, as a matrix."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(state["momentum_buffer"], MOMENTUM).flatten(1)


def is_inner_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes it: no embedding, vector, low-rank factor, nor the first or last layer."""
    is_factor = name.endswith((".A", ".B"))
    return p.ndim in (2, 4) and not is_factor and not any(word in name for word in NOT_INNER)


def make_optimizers(net: nn.Module, lr: float, weight_decay: float = 0.01) -> list:
    """AdamW, then Muon if it has anything to do."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if is_inner_matrix(name, p)]
    outer = [p for name, p in named if not is_inner_matrix(name, p)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
    if inner:
        optimizers.append(Muon(inner, lr, weight_decay))
    return optimizers
