"""LoRA: a file of small matrices that changes a model (Hu et al. 2021, arXiv:2106.09685).

    W_eff = W + scale · (alpha / rank) · B A          A (rank, in), B (out, rank)

    flux = add_lora(flux, "style.safetensors", scale=0.8)
    python -m miniflux.adapters.lora style.safetensors         what a file holds, without a model

The changes are merged into copies of the touched weights, so a step costs what it did before; with `merge=False` they stay beside
the weights and are applied to each layer's input. The weights as they were stay with the model, shared with the one it came from:
adding, scaling and removing always start from them, so what is removed is gone bit for bit. Seam: model -> model.

BFL's Control LoRAs (Canny, Depth) also widen the first layer, 64 -> 128 input channels, and replace norm scales.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.building import WithoutInitialisation
from ..checkpoints.formats import listing, read_json, read_metadata, read_safetensors
from ..checkpoints.hub import find_file, find_network
from ..checkpoints.packed import PackedLinear
from ..flux import Flux
from ..images import check_number, log
from ..networks.clip import CLIPText
from ..networks.layers import Linear
from ..networks.mmdit import MMDiT
from ..networks.t5 import T5
from .dialects import Delta, Parsed, Target, parse, targets

NETWORKS = ("mmdit", "clip", "t5")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")       # of a folder that diffusers or PEFT wrote


@dataclass(frozen=True)
class LoRA:
    """A file that was added to a model."""

    name: str
    deltas: list[Delta]
    scale: float
    merge: bool


@dataclass(frozen=True)
class LoRAs:
    """All of them, and the networks as they were before the first."""

    base: dict[str, nn.Module | None]
    added: tuple[LoRA, ...]


def add_lora(flux: Flux, path: str | Path, scale: float = 1.0, name: str | None = None, *, merge: bool = True,
             strict: bool = True) -> Flux:
    """The model with a LoRA more.

    path: a safetensors file of any dialect (`dialects.py` lists them), a folder with one, a Hub id or a shipped name. scale: how
    strongly it acts; 0 changes nothing. name: to scale or remove it by (default: the path's last part). merge: whether the weights are
    changed, or each layer's output (as always where the weights are quantised). strict: whether a tensor that belongs nowhere is an error.

    Raises FileNotFoundError for what is not there; ValueError for a file that is damaged, of another model, or not understood, and
    for a name that is used twice. The given model stays as it is."""
    scale = check_number("scale", scale, -100, 100)
    loras = flux.loras or LoRAs({part: getattr(flux, part) for part in NETWORKS}, ())
    name = Path(path).name.removesuffix(".safetensors") if name is None else name
    if not isinstance(name, str) or name in (lora.name for lora in loras.added):
        raise ValueError(f"a LoRA named {name!r} is there already: give another name=, or remove that one first")
    path = find_network(path, "LoRA")
    parsed = read_lora(path, targets(*(loras.base[part] for part in NETWORKS)))
    log.info("%s: %s", name, parsed)
    if parsed.unmatched and strict:
        raise ValueError(f"{path} {parsed}; not matched are {listing(parsed.unmatched)}: strict=False leaves them out")
    check_fit(parsed.deltas, loras.base, path)
    return with_loras(flux, LoRAs(loras.base, (*loras.added, LoRA(name, parsed.deltas, scale, merge))))


def merged_for_good(flux: Flux, path: Path) -> Flux:
    """A model that is made of another one and a file: its LoRA cannot be removed, and may widen the first layer as it likes."""
    base = {part: getattr(flux, part) for part in NETWORKS}
    parsed = read_lora(path, targets(*base.values()))
    if parsed.unmatched:
        raise ValueError(f"{path} {parsed}; not matched are {listing(parsed.unmatched)}")
    return replace(with_loras(flux, LoRAs(base, (LoRA(path.stem, parsed.deltas, 1.0, merge=True),))), loras=None)


def set_lora_scales(flux: Flux, scales: Mapping[str, float]) -> Flux:
    """The model with other scales: {name: scale}; LoRAs that are not named keep theirs."""
    have = names(flux)
    for name, scale in scales.items():
        if name not in have:
            raise ValueError(f"there is no LoRA {name!r}: expected one of {have}")
        check_number(f"the scale of {name}", scale, -100, 100)
    added = tuple(replace(lora, scale=scales.get(lora.name, lora.scale)) for lora in flux.loras.added) if have else ()
    return with_loras(flux, LoRAs(flux.loras.base, added)) if have else flux


def remove_lora(flux: Flux, name: str | None = None) -> Flux:
    """The model without one of its LoRAs, or without any: with the last of them gone, bit for bit the model before the first."""
    have = names(flux)
    if not have or name not in (None, *have):
        raise ValueError(f"there is no LoRA{'' if name is None else f' {name!r}'} to remove: the model has {have or 'none'}")
    return with_loras(flux, LoRAs(flux.loras.base, tuple(lora for lora in flux.loras.added if name not in (None, lora.name))))


def names(flux: Flux) -> list[str]:
    """The names of the LoRAs of a model, in the order they were added."""
    return [lora.name for lora in flux.loras.added] if flux.loras else []


def with_loras(flux: Flux, loras: LoRAs) -> Flux:
    """The model whose networks are the base's with these changes."""
    if not loras.added:
        return replace(flux, loras=None, **loras.base)
    changed = {part: changed_network(part, network, loras.added) for part, network in loras.base.items()}
    return replace(flux, loras=loras, **changed)


# ------------------------------------------------------------------------------------------------------------- changing


@torch.no_grad()
def changed_network(part: str, network: nn.Module | None, loras: tuple[LoRA, ...]) -> nn.Module | None:
    """A copy of a network that shares all its weights but those that the LoRAs touch."""
    touched: dict[str, list[tuple[Delta, LoRA]]] = {}
    for lora in loras:
        for delta in lora.deltas:
            if delta.target.network == part:
                touched.setdefault(delta.target.module, []).append((delta, lora))
    if not touched:
        return network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, memo=shared)
    for module, changes in touched.items():
        parent, _, attribute = module.rpartition(".")
        setattr(network.get_submodule(parent), attribute, changed_module(network.get_submodule(module), changes))
    if part == "mmdit" and network.img_in.in_features != network.config.in_channels:
        network.config = replace(network.config, in_channels=network.img_in.in_features)
    return network


def changed_module(module: nn.Module, changes: list[tuple[Delta, LoRA]]) -> nn.Module:
    """A linear layer or a norm with its changes: merged into its weight, or beside it."""
    if not isinstance(module, nn.Linear):                   # a norm's scale is replaced, whatever the LoRA's own scale
        module.scale = frozen(changes[-1][0].factors["value"].to(module.scale))
        return module
    wide = max((delta.shape[1] for delta, _ in changes if delta.shape), default=0)
    # Note: beside a packed weight all changes stay beside it: to be merged into, it would have to be unpacked for good.
    is_packed = isinstance(module, PackedLinear) and wide <= module.in_features
    layer = LoRAPackedLinear.like(module) if is_packed else LoRALinear.like(module, wide)
    merged = [(delta, lora.scale) for delta, lora in changes if lora.merge and lora.scale and not is_packed]
    if merged:
        base = layer.weight
        layer.weight, layer.bias = frozen(merged_weight(base, merged)), merged_bias(base, layer.bias, merged)
    beside = [(delta, lora.scale) for delta, lora in changes if lora.scale and (is_packed or not lora.merge)]
    weight = layer.weight if beside else None
    layer.beside = [(delta.to(weight), scale) for delta, scale in beside]
    return layer


def merged_weight(weight: Tensor, changes: list[tuple[Delta, float]]) -> Tensor:
    """W + the sum of scale · Δ, stored as W is."""
    if all(delta.is_low_rank for delta, _ in changes):
        # All of them are one product of low rank: W is read once and written once.
        b, a = zip(*((scale * b, a) for (delta, scale) in changes for b, a in [delta.low_rank(weight)]))
        return torch.addmm(weight, torch.cat(b, dim=1).to(weight), torch.cat(a).to(weight), out=torch.empty_like(weight))
    result = weight.to(torch.float32, copy=True)
    for delta, scale in changes:
        # Note: DoRA's change depends on the weight, and means the one before any change.
        delta.own_rows(result).add_(delta.of_weight(weight), alpha=scale)
    return result.to(weight.dtype)


def merged_bias(weight: Tensor, bias: Tensor | None, changes: list[tuple[Delta, float]]) -> nn.Parameter | None:
    """The layer's bias, or zeros, with what the changes add to it; None where there is neither."""
    for delta, scale in changes:
        if (change := delta.of_bias(weight)) is not None:
            bias = weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.to(torch.float32, copy=True)
            delta.own_rows(bias).add_(change, alpha=scale)
    return None if bias is None else frozen(bias.to(weight.dtype))


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class LoRALinear(Linear):
    """A linear layer, and changes that are applied to its input beside it."""

    beside: list[tuple[Delta, float]] = []

    @classmethod
    def like(cls, linear: nn.Linear, in_features: int) -> "LoRALinear":
        """The layer with the same weights; more input channels than it has get zeros."""
        with torch.device("meta"), WithoutInitialisation():
            layer = cls(max(linear.in_features, in_features), linear.out_features, bias=linear.bias is not None)
        weight = linear.weight
        if layer.in_features > linear.in_features:
            weight = frozen(nn.functional.pad(weight, (0, layer.in_features - linear.in_features)))
        layer.weight, layer.bias = weight if isinstance(weight, nn.Parameter) else frozen(weight), linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for delta, scale in self.beside:
            y = delta.apply(x, y, self, scale)
        return y


class LoRAPackedLinear(PackedLinear):
    """The same beside a weight that stays packed, and is computed with as before."""

    @classmethod
    def like(cls, linear: PackedLinear) -> "LoRAPackedLinear":
        layer = cls(linear.packed, linear.dtype, linear.q.device)
        layer.bias, layer.before = linear.bias, type(linear).forward
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(self, x)
        for delta, scale in self.beside:
            y = delta.apply(x, y, self, scale)
        return y


# -------------------------------------------------------------------------------------------------------------- reading


def read_lora(path: Path, table: dict[str, Target]) -> Parsed:
    """The changes that a file, or a folder with one, asks for."""
    metadata = {}
    if path.is_dir():
        folder, path = path, find_file(path, "LoRA", FILES)
        if (folder / "adapter_config.json").is_file():
            import json
            metadata = {"lora_adapter_metadata": json.dumps(read_json(folder / "adapter_config.json"))}
    return parse(read_safetensors(path), metadata or read_metadata(path), table, path)


def check_fit(deltas: list[Delta], base: dict[str, nn.Module | None], path: Path) -> None:
    """Refuses changes that have not the shapes of what they change. Only the first layer may differ: a Control LoRA doubles its
    input channels, and what was made for fewer leaves the further ones alone."""
    latents = base["mmdit"].config.out_channels
    for delta in deltas:
        network, name, rows, _ = delta.target
        module = base[network].get_submodule(name)
        weight = module.weight if isinstance(module, nn.Linear) else module.scale
        height = rows[1] - rows[0] if rows else len(weight)
        for kind in ("bias", "diff_b", "value"):
            if kind in delta.factors and delta.factors[kind].shape != (height,):
                raise ValueError(f"{path}: {name} has a {kind} of the shape {list(delta.factors[kind].shape)}, expected [{height}]")
        if (shape := delta.shape) is None:
            continue
        fits = shape[1] == weight.shape[-1] or name == "img_in" and shape[1] in (latents, 2 * latents)
        if weight.ndim != 2 or shape[0] != height or not fits:
            raise ValueError(f"{path} is for another model: it changes {name} by {list(shape)}, which is "
                             f"{[height, *weight.shape[1:]]} here")
        if "dora" in delta.factors and delta.factors["dora"].numel() not in shape:
            raise ValueError(f"{path}: {name} has DoRA magnitudes of the shape {list(delta.factors['dora'].shape)}, expected one "
                             f"for each of {shape[0]} rows or {shape[1]} columns")


def official_targets() -> dict[str, Target]:
    """The names of the official models' modules."""
    with torch.device("meta"), WithoutInitialisation():
        return targets(MMDiT(), CLIPText(), T5())


def main() -> None:
    from ..cli import Parser

    parser = Parser(prog="python -m miniflux.adapters.lora", description="Say what LoRA files hold, without loading a model; the exit "
                    "code is 1 if anything in them is not understood.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a safetensors file, a folder with one, a Hub id or a shipped name")
    table, understood = None, True
    for file in parser.parse_args().files:
        table = table or official_targets()
        try:
            parsed = read_lora(find_network(file, "LoRA"), table)
        except (ValueError, OSError) as error:
            understood = False
            print(f"{file}: {error}")
            continue
        print(f"{file}: {parsed}")
        if parsed.unmatched:
            understood = False
            print(f"{file}: not matched are {listing(parsed.unmatched)}")
    raise SystemExit(0 if understood else 1)


if __name__ == "__main__":
    main()
