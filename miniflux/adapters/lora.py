"""LoRA: a file of small matrices that changes a model (Hu et al. 2021, arXiv:2106.09685).

    W_eff = W + scale · (alpha / rank) · B A          A (rank, in), B (out, rank)

    flux = add_lora(flux, "style.safetensors", scale=0.8)
    python -m miniflux.adapters.lora style.safetensors         what a file holds, without a model

The changes are merged into copies of the touched weights, so a step costs what it did before; with
`merge=False` they stay unmerged, as layers around those they change (`lora_layers.py`). The
weights as they were stay with the model, shared with the one it came from: adding, scaling and
removing start from them, so what is removed is gone bit for bit. Seam: model -> model.

BFL's Control LoRAs (Canny, Depth) also widen the first layer, 64 -> 128 input channels, and replace
norm scales.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.building import WithoutInitialisation
from ..checkpoints.formats import listing
from ..checkpoints.hub import find_network
from ..checkpoints.quantized import QuantizedLinear
from ..checks import check_number
from ..command import Parser, command, say, tell
from ..flux import Flux
from ..imaging.images import log
from ..networks.layers import Linear
from .dialects import targets
from .lora_changes import (
    BIAS_KINDS,
    Change,
    Scaled,
    in_our_order,
    like_weight,
    rows_of,
    weight_name,
    with_layers,
)
from .lora_checks import check_fit
from .lora_file import Parsed, lacking, official_targets, read_lora

NETWORKS = ("mmdit", "clip", "t5")


@dataclass(frozen=True)
class LoRA:
    """A file that was added to a model."""

    name: str
    changes: list[Change]
    scale: float
    merge: bool


@dataclass(frozen=True)
class LoRAs:
    """All of them, and the networks as they were before the first."""

    base: dict[str, nn.Module | None]
    added: tuple[LoRA, ...]


def add_lora(flux: Flux, path: str | Path, scale: float = 1.0, name: str | None = None, *,
             merge: bool = True, strict: bool = True) -> Flux:
    """The model with a LoRA more; the given model stays as it is.

    path: a safetensors file of any dialect (see `dialects.py`), a folder with one, a Hub id or
    a shipped name.
    scale: how strongly it acts, -100 to 100; 0 changes nothing.
    name: to scale or remove it by (default: the path's last part).
    merge: whether the weights are changed, or each layer's output (always so if quantised).
    strict: whether a tensor that belongs nowhere in this model is an error, or is left out.

    Raises FileNotFoundError for what is not there; ValueError for a file that is damaged, of
    another model, or not understood, and for a name that is used twice."""
    scale = check_number("scale", scale, -100, 100)
    loras = flux.loras or LoRAs({part: getattr(flux, part) for part in NETWORKS}, ())
    name = Path(path).name.removesuffix(".safetensors") if name is None else name
    if not isinstance(name, str) or name in (lora.name for lora in loras.added):
        raise ValueError(f"a LoRA named {name!r} is there already: give another name=, "
                         "or remove that one first")
    path = find_network(path, "LoRA")
    parsed = read_lora(path, targets(*(loras.base[part] for part in NETWORKS)))
    log.info("%s: %s", name, parsed)
    if parsed.unmatched and strict:
        raise ValueError(f"{path} {not_matched(parsed)}: strict=False leaves them out")
    check_fit(parsed.changes, loras.base, path)
    added = LoRA(name, parsed.changes, scale, merge)
    return with_loras(flux, LoRAs(loras.base, (*loras.added, added)))


def fuse_lora(flux: Flux, path: Path) -> Flux:
    """A model that is made of another one and a file, whose LoRA cannot be removed again."""
    base = {part: getattr(flux, part) for part in NETWORKS}
    parsed = read_lora(path, targets(*base.values()))
    if parsed.unmatched:
        raise ValueError(f"{path} {not_matched(parsed)}")
    added = LoRA(path.stem, parsed.changes, 1.0, merge=True)
    return replace(with_loras(flux, LoRAs(base, (added,))), loras=None)


def not_matched(parsed: Parsed) -> str:
    """What of a file belongs nowhere in this model, and why if that is known."""
    why = ", for parts that this model does not have" if lacking(parsed.unmatched) else ""
    return f"{parsed}; not matched are {listing(parsed.unmatched)}{why}"


def set_lora_scales(flux: Flux, scales: Mapping[str, float]) -> Flux:
    """The model with other scales: {name: scale}; LoRAs that are not named keep theirs."""
    have, new = names(flux), {}
    for name, scale in scales.items():
        if name not in have:
            raise ValueError(f"there is no LoRA {name!r}: expected one of {have}")
        new[name] = check_number(f"the scale of {name}", scale, -100, 100)
    if not have:
        return flux
    old = flux.loras.added
    added = tuple(replace(lora, scale=new.get(lora.name, lora.scale)) for lora in old)
    return with_loras(flux, LoRAs(flux.loras.base, added))


def remove_lora(flux: Flux, name: str | None = None) -> Flux:
    """The model without one of its LoRAs, or without any.

    With the last of them gone it is, bit for bit, the model before the first."""
    have = names(flux)
    if not have or name not in (None, *have):
        which = "" if name is None else f" {name!r}"
        raise ValueError(f"there is no LoRA{which} to remove: the model has {have or 'none'}")
    kept = tuple(lora for lora in flux.loras.added if name not in (None, lora.name))
    return with_loras(flux, LoRAs(flux.loras.base, kept))


def names(flux: Flux) -> list[str]:
    """The names of the LoRAs of a model, in the order they were added."""
    return [lora.name for lora in flux.loras.added] if flux.loras else []


def with_loras(flux: Flux, loras: LoRAs) -> Flux:
    """The model whose networks are the base's with these changes."""
    if not loras.added:
        return replace(flux, loras=None, **loras.base)
    changed = {part: changed_network(part, base, loras.added) for part, base in loras.base.items()}
    return replace(flux, loras=loras, **changed)


# ----------------------------------------------------------------------------------------- changing

@torch.no_grad()
def changed_network(part: str, network: nn.Module | None,
                    loras: tuple[LoRA, ...]) -> nn.Module | None:
    """A copy of a network that shares all its weights but those that the LoRAs touch."""
    touched: dict[str, list[tuple[Change, LoRA]]] = {}
    for lora in loras:
        for change in lora.changes:
            # Note: at a scale of 0 nothing is replaced or widened either.
            if change.target.network == part and lora.scale:
                touched.setdefault(change.target.module, []).append((change, lora))
    if not touched:
        return network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, memo=shared)
    for name, changes in touched.items():
        merged = [(change, lora.scale) for change, lora in changes if lora.merge]
        unmerged = [(change, lora.scale) for change, lora in changes if not lora.merge]
        network.set_submodule(name, changed_module(network.get_submodule(name), merged, unmerged))
    if part == "mmdit" and network.img_in.in_features != network.config.in_channels:
        network.config = replace(network.config, in_channels=network.img_in.in_features)
    return network


def changed_module(module: nn.Module, merged: Scaled, unmerged: Scaled) -> nn.Module:
    """A module (a copy of its own) with its changes.

    What is replaced or added to a bias is always merged; so is what changes a norm or embedding.
    """
    changes = merged + unmerged
    if not isinstance(module, nn.Linear):
        merged, unmerged = changes, []
    width = max(change.width for change, _ in changes)
    module = with_replaced_weight(widened(module, width), changes)
    if any(kind in change.factors for change, _ in changes for kind in BIAS_KINDS):
        module.bias = changed_bias(module, changes)
    # Note: nothing is merged into a packed weight, which would have to be unpacked for good.
    if isinstance(module, QuantizedLinear):
        merged, unmerged = [], changes
    name = weight_name(module)
    if any(change.moves_weight for change, _ in merged):
        setattr(module, name, frozen(merged_weight(module, name, merged)))
    return with_layers(module, unmerged).train(module.training)


def widened(module: nn.Module, in_features: int) -> nn.Module:
    """The module; for a linear layer with fewer input channels, one with zeros for the others."""
    if not isinstance(module, nn.Linear) or module.in_features >= in_features:
        return module
    weight = nn.functional.pad(module.weight, (0, in_features - module.in_features))
    return with_weight(module, weight)


def with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """A layer with another weight and the same bias, for one that may be packed or narrower."""
    with torch.device("meta"), WithoutInitialisation():
        layer = Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    layer.weight, layer.bias = frozen(weight), linear.bias
    return layer.train(linear.training)


def with_replaced_weight(module: nn.Module, changes: Scaled) -> nn.Module:
    """The module with those rows replaced that a LoRA brings as a whole, whatever its scale."""
    values = [change for change, _ in changes if "weight" in change.factors]
    if not values:
        return module
    name = weight_name(module)
    weight = getattr(module, name).clone()
    for change in values:
        weight[rows_of(change)] = in_our_order(change, change.factors["weight"]).to(weight)
    if isinstance(module, QuantizedLinear):
        return with_weight(module, weight)
    setattr(module, name, frozen(weight))
    return module


def changed_bias(module: nn.Module, changes: Scaled) -> nn.Parameter:
    """The module's bias, or zeros, with what the changes replace or add."""
    bias, like = module.bias, like_weight(module)
    parts = [(change, scale, kind) for kind in BIAS_KINDS for change, scale in changes
             if kind in change.factors]
    if bias is None:
        bias = torch.zeros(module.out_features, device=like.device)
    bias = bias.to(torch.float32, copy=True)
    for change, scale, kind in parts:
        value = in_our_order(change, change.factors[kind]).to(bias)
        if kind == "bias":
            bias[rows_of(change)] = value
        else:
            bias[rows_of(change)] += scale * (change.scale if kind == "B_bias" else 1) * value
    return frozen(bias.to(like.dtype))


def merged_weight(module: nn.Module, name: str, changes: Scaled) -> Tensor:
    """The weight with all that these changes add to it."""
    weight = getattr(module, name)
    if weight.ndim == 1:                                    # of a norm
        return weight + sum(scale * change.factors["diff"].to(weight)
                            for change, scale in changes if "diff" in change.factors)
    return with_layers(module, changes, torch.float32).merged()


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@command
def main() -> None:
    parser = Parser(prog="python -m miniflux.adapters.lora",
                    description="Lists what LoRA files hold, without loading a model; "
                    "the exit code is 1 if anything in them is not understood, 2 if one "
                    "cannot be read.")
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="a safetensors file, a folder with one, a Hub id or a shipped name")
    table, code = None, 0
    for file in parser.parse_args().files:
        table = table or official_targets()
        try:
            parsed = read_lora(find_network(file, "LoRA"), table)
        except (ValueError, OSError) as error:
            tell(f"{file}: {error}")
            code = 2
            continue
        say(f"{file}: {parsed}")
        if parsed.unmatched:
            say(f"{file}: not matched are {listing(parsed.unmatched)}")
            code = code or 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
