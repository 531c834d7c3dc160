"""Checks of a LoRA file: its numbers, its factors together, and whether they fit the model."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .lora_changes import BIAS_KINDS, Change, product_shape, weight_shape


def check_numbers(kind: str, factor: Tensor, bad: Callable[[str], ValueError]) -> None:
    """Refuses elements that are no finite floating-point numbers, or integers where those do."""
    is_integer = not factor.is_floating_point() and factor.dtype != torch.bool
    if not factor.is_floating_point() and not (is_integer and kind in ("alpha", "reshape")):
        raise bad(f"holds {kind} as {factor.dtype}, expected floating-point numbers")
    if not factor.is_meta and not torch.isfinite(factor.float()).all():
        raise bad(f"holds {kind} with NaN or infinity: the file is damaged, get it again")


def check_factors(factors: dict[str, Tensor], bad: Callable[[str], ValueError]) -> int | None:
    """The rank of factors that fit together; None where they are whole matrices."""
    if ("A" in factors) != ("B" in factors):
        raise bad(f"has only one half of a LoRA, {'A' if 'A' in factors else 'B'}")
    pairs = [("B", "A")] if "A" in factors else []
    for family in ("lokr_", "hada_"):
        if not any(kind.startswith(family) for kind in factors):
            continue
        for w in (f"{family}w1", f"{family}w2"):
            halves = (f"{w}_a", f"{w}_b")
            has_halves = [half in factors for half in halves]
            if w in factors and not any(has_halves):
                if factors[w].ndim != 2:
                    raise bad(f"has a {w} of the shape {list(factors[w].shape)}, expected a matrix")
            elif w not in factors and all(has_halves):
                pairs.append(halves)
            else:
                raise bad(f"lacks {w}, or has it twice")
    ranks = set()
    for up, down in pairs:
        b, a = factors[up], factors[down]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
            raise bad(f"has factors of the shapes {list(a.shape)} and {list(b.shape)}, "
                      "whose ranks disagree")
        ranks.add(len(a))
    if len(ranks) > 1:
        raise bad(f"has factors of the ranks {sorted(ranks)}, expected one rank")
    if "hada_w1_a" in factors:
        shapes = [product_shape(factors, f"hada_{w}") for w in ("w1", "w2")]
        if shapes[0] != shapes[1]:
            raise bad(f"has products of the shapes {shapes[0]} and {shapes[1]}, expected one shape")
    return ranks.pop() if ranks else None


def check_overlaps(names: list[tuple[str, str]], changes: list[Change], source) -> None:
    """Refuses two changes of the same rows: one LoRA under two names would act twice.

    PEFT's adapters with names of their own all act."""
    seen: dict[tuple[str, str, bool, str], list[tuple[tuple[int, float], str]]] = {}
    for (spelled, adapter), change in zip(names, changes):
        start, stop = change.target.rows or (0, float("inf"))
        replaces = "weight" in change.factors or "bias" in change.factors
        for is_bias in (False, True):
            moves_bias = any(kind in change.factors for kind in BIAS_KINDS)
            if not (moves_bias if is_bias else change.shape):
                continue
            key = change.target.network, change.target.module, is_bias, "" if replaces else adapter
            for (begin, end), other in seen.setdefault(key, []):
                if start < end and begin < stop:
                    raise ValueError(f"{source} has two changes of {change.target.module}, "
                                     f"{other[:100]} and {spelled[:100]}: it is not clear whether "
                                     "both are meant")
            seen[key].append(((start, stop), spelled))


def check_fit(changes: list[Change], base: dict[str, nn.Module | None], path: Path) -> None:
    """Refuses changes that have not the shapes of what they change.

    Only the first layer may differ: a Control LoRA doubles its input channels, and what was made
    for fewer leaves the further ones alone."""
    latents = base["mmdit"].config.out_channels
    for change in changes:
        network, name, rows, _ = change.target
        module = base[network].get_submodule(name)
        expected = list(weight_shape(module))
        expected[0] = rows[1] - rows[0] if rows else expected[0]
        for kind in BIAS_KINDS:
            if kind in change.factors and not hasattr(module, "bias"):
                raise ValueError(f"{path}: {name} has a {kind}, and no bias in this model")
            if kind in change.factors and list(change.factors[kind].shape) != expected[:1]:
                raise ValueError(f"{path}: {name} has a {kind} of the shape "
                                 f"{list(change.factors[kind].shape)}, expected {expected[:1]}")
        shape = change.shape
        if shape is None:
            continue
        widths = (latents, 2 * latents) if name == "img_in" and network == "mmdit" else ()
        fits = len(shape) == len(expected) and shape[0] == expected[0] and (
            list(shape) == expected or shape[1] in widths)
        if not fits:
            raise ValueError(f"{path} is for another model: it changes {name} by {list(shape)}, "
                             f"which is {expected} here")
        if "dora" in change.factors and change.factors["dora"].numel() not in shape:
            raise ValueError(f"{path}: {name} has DoRA magnitudes of the shape "
                             f"{list(change.factors['dora'].shape)}, expected one for each of "
                             f"{shape[0]} rows or {shape[1]} columns")
