"""A change that a LoRA file asks for, and the layers that make it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints.names import swap_halves
from ..checkpoints.quantized import QuantizedLinear
from .dialects import Target
from .lora_layers import DiffLinear, DoRALinear, LoHaLinear, LoKrLinear, LoRALinear

BIAS_KINDS = ("bias", "B_bias", "diff_b")


@dataclass(frozen=True)
class Change:
    """What a file changes in one module: `factors` by their kinds, and the scale alpha / rank."""

    target: Target
    factors: dict[str, Tensor]
    scale: float

    @property
    def rank(self) -> int:
        return len(self.factors["A"]) if "A" in self.factors else 0

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(out, in) of the change of the weight; None where it changes none."""
        f = self.factors
        if "A" in f:
            return len(f["B"]), f["A"].shape[1]
        if "hada_w1_a" in f:
            return product_shape(f, "hada_w1")
        if "lokr_w1" in f or "lokr_w1_a" in f:
            shapes = [product_shape(f, w) for w in ("lokr_w1", "lokr_w2")]
            return shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1]
        whole = f.get("diff", f.get("weight"))
        return None if whole is None else tuple(whole.shape)

    @property
    def width(self) -> int:
        """How many input channels it changes; 0 for a vector, or none."""
        return self.shape[1] if self.shape and len(self.shape) > 1 else 0

    @property
    def moves_weight(self) -> bool:
        """Whether it adds something to the weight."""
        return self.shape is not None and "weight" not in self.factors

    @property
    def is_low_rank(self) -> bool:
        """Whether what it adds is B A and nothing else: most are."""
        return "A" in self.factors and "dora" not in self.factors


def product_shape(factors: dict[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a factor that is whole, or a product of halves."""
    if name in factors:
        return tuple(factors[name].shape)
    return len(factors[f"{name}_a"]), factors[f"{name}_b"].shape[1]


Scaled = list[tuple[Change, float]]    # changes of one module, with the scales of their LoRAs


def with_layers(module: nn.Module, changes: Scaled, dtype: torch.dtype | None = None) -> nn.Module:
    """The module in the layers of its changes; all plain LoRAs are one, as they are one product.

    dtype: of the factors of the others (default: the weight's)."""
    like = like_weight(module)
    moving = [(change, scale) for change, scale in changes if change.moves_weight]
    if plain := [pair for pair in moving if pair[0].is_low_rank]:
        module = low_rank_layer(module, plain, like)
    like = like.to(dtype or like.dtype)
    for change, scale in moving:
        if not change.is_low_rank:
            module = whole_layer(module, change, scale, like)
    return module


def low_rank_layer(base: nn.Module, changes: Scaled, like: Tensor) -> LoRALinear:
    """One layer for several plain LoRAs, with zeros for rows and columns that one does not change.

        Σ scale · B A = [scale₁ B₁, scale₂ B₂, ...] [A₁; A₂; ...]
    """
    out_features, in_features = weight_shape(base)
    downs, ups = [], []
    for change, scale in changes:
        A, B = (change.factors[kind].to(like.device, torch.float32) for kind in "AB")
        start, stop = change.target.rows or (0, out_features)
        B = nn.functional.pad(in_our_order(change, B), (0, 0, start, out_features - stop))
        downs.append(nn.functional.pad(A, (0, in_features - A.shape[1])))
        ups.append(scale * change.scale * B)
    A, B = torch.cat(downs), torch.cat(ups, dim=1)
    layer = LoRALinear(base, A.to(like), B.to(like))
    layer.A.requires_grad_(False)
    layer.B.requires_grad_(False)
    return layer


def whole_layer(base: nn.Module, change: Change, scale: float, like: Tensor) -> DiffLinear:
    """A change that is no product of two small matrices, around a layer."""
    factors = {kind: factor.to(like) for kind, factor in change.factors.items()
               if kind not in BIAS_KINDS}
    rows, swapped = change.target.rows, change.target.swapped
    if "dora" in factors:
        magnitudes = factors.pop("dora")
        if "A" in factors:
            inner = LoRALinear(None, factors["A"], factors["B"], change.scale)
        else:
            inner = kind_of(change)(None, change.scale, factors)
        return DoRALinear(base, scale, inner, magnitudes, rows, swapped)
    return kind_of(change)(base, scale * change.scale, factors, rows, swapped)


def kind_of(change: Change) -> type[DiffLinear]:
    if "diff" in change.factors:
        return DiffLinear
    return LoHaLinear if "hada_w1_a" in change.factors else LoKrLinear


def rows_of(change: Change) -> slice:
    return slice(*change.target.rows) if change.target.rows else slice(None)


def in_our_order(change: Change, factor: Tensor) -> Tensor:
    return swap_halves(factor) if change.target.swapped else factor


def like_weight(module: nn.Module) -> Tensor:
    """An empty tensor of the weight's dtype, where the weight is."""
    if isinstance(module, QuantizedLinear):
        return torch.empty(0, dtype=module.dtype, device=module.q.device)
    return getattr(module, weight_name(module))[:0]


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight, or of a norm's scale, without unpacking it."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(getattr(module, weight_name(module)).shape)


def weight_name(module: nn.Module) -> str:
    return "scale" if isinstance(getattr(module, "scale", None), nn.Parameter) else "weight"


