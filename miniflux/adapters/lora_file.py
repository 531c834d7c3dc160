"""A LoRA file -> the changes of a model that it asks for, checked.

A change is for one module, or some rows of one, and is one of the formulas of `lora_layers.py`:

    A, B               a LoRA; with `B_bias` it changes the bias too
    lokr_*, hada_*     LoKr, LoHa
    diff, diff_b       the difference itself, of any weight and bias
    dora               the magnitudes of a DoRA, beside any of the first two
    weight, bias       what takes the place of the model's own

What cannot be read exactly is refused: nothing in a file is used by half.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.building import WithoutInitialisation
from ..checkpoints.formats import listing, read_metadata, read_safetensors
from ..checkpoints.hub import find_file
from ..networks.clip import CLIPText
from ..networks.mmdit import MMDiT
from ..networks.t5 import T5
from .dialects import Name, Target, dialect, other_method, other_model, split_name, targets
from .lora_changes import BIAS_KINDS, Change
from .lora_checks import check_factors, check_numbers, check_overlaps
from .peft_settings import Settings, read_settings, saves_bias, saves_weight, scale_of

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")   # of diffusers and PEFT
WEIGHT_KINDS = ("A", "lokr_", "hada_", "diff", "weight")                    # one of these a change


@dataclass(frozen=True)
class Parsed:
    """A file, understood."""

    changes: list[Change]
    dialect: str
    total: int
    unmatched: list[str]

    def __str__(self) -> str:
        ranks = sorted({change.rank for change in self.changes if change.rank})
        alphas = sorted({round(change.scale * change.rank, 4)
                         for change in self.changes if change.rank})
        parts = Counter(change.target.network for change in self.changes)
        return (f"matched {self.total - len(self.unmatched)} of {self.total} tensors, "
                f"dialect {self.dialect}, rank {few(ranks)}, alpha {few(alphas)}, changes "
                + ", ".join(f"{number} modules of {part}" for part, number in parts.items()))


def few(values: list) -> str:
    if len(values) < 2:
        return f"{values[0]:g}" if values else "none"
    return f"{values[0]:g} to {values[-1]:g}"


def read_lora(path: Path, table: dict[str, Target]) -> Parsed:
    """The changes that a file, or a folder with one, asks for.

    table: the names of the model's modules (`targets`).
    Raises ValueError for a file that is damaged, of another model, or not understood."""
    path = find_file(path, "LoRA", FILES) if path.is_dir() else path
    state = read_safetensors(path)
    return parse(state, read_settings(path, read_metadata(path)), table, path)


def parse(state: dict[str, Tensor], settings: dict[str, Settings], table: dict[str, Target],
          source) -> Parsed:
    """Sorts the tensors of a file into changes; raises ValueError for what is not clear."""
    for key in state:
        if method := other_method(key):
            raise ValueError(f"{source} holds {key[:100]}, of {method}: "
                             "LoRA, DoRA, LoKr, LoHa and full differences are read")
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}   # (module as spelled, adapter): factors
    modules: dict[str, str] = {}                            # module as spelled -> key of the table
    unmatched = []
    for key, tensor in state.items():
        name = split_name(key, table)
        if name is None or not is_change(name, table, settings):
            unmatched.append(key)
            continue
        modules[name.spelled] = name.module
        factors = groups.setdefault((name.spelled, name.adapter), {})
        kind = name.kind.removeprefix("saved_")
        if kind in factors:
            raise ValueError(f"{source} holds two tensors for one factor of {name.module}: "
                             f"{key[:100]} and another")
        factors[kind] = tensor
    if not groups:
        raise not_a_lora(list(state), source)
    share_alphas(groups)
    changes = []
    for (spelled, _), factors in groups.items():
        module = modules[spelled]
        own = settings.get(table[module].network)
        changes.append(make_change(module, factors, table[module], own, source))
    check_overlaps(list(groups), changes, source)
    return Parsed(changes, dialect(list(state)), len(state), unmatched)


def is_change(name: Name, table: dict[str, Target], settings: dict[str, Settings]) -> bool:
    """Whether it changes something. A plain weight or bias replaces the model's if it is a norm's
    scale of a Control LoRA, or if PEFT's settings name it; others are of a whole model, given by
    mistake."""
    target = table[name.module]
    values = settings.get(target.network, {})
    if name.kind == "weight":
        is_norm = target.module.endswith(("query_norm", "key_norm"))
        return is_norm or saves_weight(values, name.module)
    return name.kind != "bias" or saves_bias(values, name.module)


def not_a_lora(keys: list[str], source) -> ValueError:
    """Why none of these names is a change of the model."""
    if not keys:
        why = "it holds no tensors"
    elif model := other_model(keys):
        why = f"its names are those of {model}'s"
    elif absent := lacking(keys):
        return ValueError(f"{source} changes only parts that this model does not have: "
                          f"{listing(absent)}")
    else:
        why = f"it holds {listing(keys)}"
    return ValueError(f"{source} is no LoRA of FLUX.1: {why}")


def lacking(keys: list[str]) -> list[str]:
    """Those of these names that are for a part of an official model, and not for this one's."""
    found = [(key, split_name(key, official_targets())) for key in keys]
    return [key for key, name in found if name and name.kind not in ("weight", "bias")]


def share_alphas(groups: dict[tuple[str, str], dict[str, Tensor]]) -> None:
    """Gives an alpha that stands once to all it is for: adapters of a module, parts of a layer."""
    for (spelled, adapter), factors in list(groups.items()):
        if factors.keys() != {"alpha"}:
            continue
        parts = (f"{spelled}.", f"{spelled}_")
        others = [key for key in groups if key != (spelled, adapter)
                  and (key[0] == spelled or key[0][:-1] in parts)]
        for key in others:
            groups[key].setdefault("alpha", factors["alpha"])
        if others:
            del groups[spelled, adapter]


def make_change(name: str, factors: dict[str, Tensor], target: Target, settings: Settings | None,
                source) -> Change:
    """One change from its factors, which are checked against each other."""
    def bad(why: str) -> ValueError:
        return ValueError(f"{source}: {name} {why}")

    for kind, factor in factors.items():
        check_numbers(kind, factor, bad)
    factors = {kind: flat(factor) for kind, factor in factors.items() if kind != "reshape"}
    alpha = factors.pop("alpha", None)
    rank = check_factors(factors, bad)
    weights = [kind for kind in WEIGHT_KINDS if any(is_kind(f, kind) for f in factors)]
    biases = [kind for kind in BIAS_KINDS if kind in factors]
    if len(weights) > 1 or {"B_bias", "diff_b"} <= set(biases):
        raise bad(f"has several changes of one parameter: {', '.join(factors)}")
    if not weights and not biases:
        raise bad(f"has only {', '.join(factors) or 'an alpha'}, and nothing that this belongs to")
    if "dora" in factors and weights not in (["A"], ["lokr_"], ["hada_"]):
        raise bad("has DoRA magnitudes, and no LoRA that they belong to")
    if settings and settings.get("use_dora") and "A" in factors and "dora" not in factors:
        raise bad("lacks the DoRA magnitudes that its settings mention")
    if alpha is not None:
        if alpha.numel() != 1:
            raise bad(f"has an alpha of the shape {list(alpha.shape)}, expected one number")
        # Note: a whole Kronecker factor has no rank, and LyCORIS' alpha then counts for nothing.
        scale = 1.0 if rank is None or alpha.is_meta else alpha.item() / rank
    elif settings is not None and weights and weights[0] in ("A", "lokr_", "hada_"):
        scale = scale_of(settings, name, rank, source)
    else:
        scale = 1.0
    return Change(target, factors, scale)


def is_kind(factor: str, kind: str) -> bool:
    return factor == kind or kind[-1] == "_" and factor.startswith(kind)


def flat(factor: Tensor) -> Tensor:
    """1x1 convolutions, as which some tools store linear layers, as matrices."""
    return factor.flatten(1) if factor.ndim == 4 and factor.shape[2:] == (1, 1) else factor


@lru_cache(1)
def official_targets() -> dict[str, Target]:
    """The names of the official models' modules."""
    with torch.device("meta"), WithoutInitialisation():
        return targets(MMDiT(), CLIPText(), T5())
