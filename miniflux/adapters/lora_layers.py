"""A linear layer with a LoRA on it, and its relatives (Hu et al. 2021, arXiv:2106.09685).

    W' = W + scale · Δ

    LoRALinear      Δ = B A                                   A (rank, in), B (out, rank)
    DiffLinear      Δ = D                                     D (out, in)
    LoKrLinear      Δ = w1 ⊗ w2                               arXiv:2309.14859
    LoHaLinear      Δ = (w1_a w1_b) ∘ (w2_a w2_b)             arXiv:2108.06098
    DoRALinear      Δ = m (W + Δ') / |W + Δ'| - W             arXiv:2402.09353; Δ' as above

Each is a layer around another one, its base: `forward` leaves the base's weight alone and adds
scale · Δ x to its output; `merged` is the one weight W' that computes the same. So a LoRA can be
trained and stacked as a layer, or merged to cost nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.names import swap_halves


class LoRALinear(nn.Module):
    """y = W x + b + scale · B (A x), where scale is the user's · alpha / rank."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float = 1.0):
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Parameter(A)                                                # (rank, in)
        self.B = nn.Parameter(B)                                                # (out, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)    # (..., out)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + scale · B A, by rows or by columns as W is stored: (out, in)."""
        W = self.base.weight
        return torch.addmm(W, self.B, self.A, alpha=self.scale, out=torch.empty_like(W))

    @property
    def weight(self) -> Tensor:
        return self.merged()

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


def insert_loras(network: nn.Module, rank: int) -> dict[str, LoRALinear]:
    """Puts a LoRA on each linear layer of a network, and freezes everything else, for training.

    B begins at zero, so the network computes what it did before. Returns layer name -> its LoRA."""
    network.requires_grad_(False)
    loras = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = layer.weight                                               # (out, in)
            A = torch.randn(rank, weight.shape[1]).to(weight) / weight.shape[1] ** 0.5
            loras[name] = LoRALinear(layer, A, weight.new_zeros(weight.shape[0], rank))
            network.set_submodule(name, loras[name])
    return loras


class DiffLinear(LoRALinear):
    """y = W x + b + scale · D x, for changes that are no product of two small matrices.

    rows: (start, stop) of those that it changes, such as q's in a fused layer; by default all.
    swapped: whether Δ has the two halves of its rows in the other order."""

    def __init__(self, base: nn.Module, scale: float, factors: dict[str, Tensor],
                 rows: tuple[int, int] | None = None, swapped: bool = False):
        nn.Module.__init__(self)
        self.base, self.scale = base, scale
        self.rows, self.swapped = slice(*rows) if rows else slice(None), swapped
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(x, self.own_delta().to(x.dtype))                      # (..., own rows)
        y = self.base(x).clone()                                                # (..., out)
        y[..., self.rows] += self.scale * change
        return y

    @torch.no_grad()
    def merged(self) -> Tensor:
        weight = self.base.weight.to(torch.float32, copy=True)
        weight[self.rows] += self.scale * self.own_delta()
        return weight.to(self.base.weight.dtype)

    def own_delta(self) -> Tensor:
        """Δ of its own rows in our order, float32, with zeros for inputs it was not made for."""
        weight = self.own_weight().float()
        delta = self.delta(weight)
        delta = F.pad(delta, (0, weight.shape[1] - delta.shape[1]))
        return swap_halves(delta) if self.swapped else delta                    # (own rows, in)

    def own_weight(self) -> Tensor:
        """Its rows of W before any change, in the file's order."""
        base = self.base
        while isinstance(base, LoRALinear):
            base = base.base
        weight = base.weight[self.rows]
        return swap_halves(weight) if self.swapped else weight                  # (own rows, in)

    def delta(self, weight: Tensor) -> Tensor:
        return self.diff.float()


class LoKrLinear(DiffLinear):
    """Δ = w1 ⊗ w2, where each is whole or a product a b."""

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = (product(self, f"lokr_{w}") for w in ("w1", "w2"))
        return torch.kron(w1, w2)


class LoHaLinear(DiffLinear):
    """Δ = (w1_a w1_b) ∘ (w2_a w2_b), number by number."""

    def delta(self, weight: Tensor) -> Tensor:
        return product(self, "hada_w1") * product(self, "hada_w2")


class DoRALinear(DiffLinear):
    """Δ = m (W + Δ') / |W + Δ'| - W: the direction comes from another change, the length is m.

    inner: that change, around no layer. m: one number for each row (PEFT) or each column (LyCORIS).
    Note: W is the weight before any change, also where several LoRAs are stacked."""

    def __init__(self, base: nn.Module, scale: float, inner: LoRALinear, m: Tensor,
                 rows: tuple[int, int] | None = None, swapped: bool = False):
        super().__init__(base, scale, {"m": m}, rows, swapped)
        self.inner = inner

    def delta(self, weight: Tensor) -> Tensor:
        change = self.inner.delta(weight) if isinstance(self.inner, DiffLinear) else (
            self.inner.B.float() @ self.inner.A.float())
        changed = weight + self.inner.scale * F.pad(change, (0, weight.shape[1] - change.shape[1]))
        m = self.m.float()
        by_rows = m.ndim == 1 or m.shape[0] == len(changed) != 1
        if by_rows:
            return m.view(-1, 1) * changed / changed.norm(dim=1, keepdim=True) - weight
        return m.view(1, -1) * changed / changed.norm(dim=0, keepdim=True) - weight


def product(layer: nn.Module, name: str) -> Tensor:
    """A factor that is whole, or the product of its halves, in float32."""
    if hasattr(layer, name):
        return getattr(layer, name).float()
    return getattr(layer, f"{name}_a").float() @ getattr(layer, f"{name}_b").float()
