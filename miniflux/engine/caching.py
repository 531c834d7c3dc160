"""Steps that are not computed: neighbouring steps resemble each other, so a part of one is remembered from another.

    flux = cache(flux, "first_block", threshold=0.05)
    flux = cache(flux, "taylor", interval=5)

first_block     Every step runs the first block. If what that adds to the image tokens has hardly changed since the last full step,
                    mean |r - r_last| <= threshold · mean |r_last|,          r = block_0(img) - img
                then the other blocks are skipped, and what they added then is added now (ParaAttention's first-block cache, after
                TeaCache, Liu et al. 2024, arXiv:2411.19108).
taylor          The first steps and then every `interval`-th are computed; between them the velocity v follows its Taylor series,
                    v(s + Δ) = Σ_k Δᵏ / k! · f_k,          f_0 = v,   f_k+1 = (f_k - f_k at the last full step) / steps between
                (TaylorSeer, Liu et al. 2025, arXiv:2503.06923, in diffusers' lite form, which predicts only what leaves the network).

Both passes of true CFG have a memory of their own, and so has each call. `python -m miniflux.bench caching` shows what is gained beside
simply taking fewer steps. Seam: model -> model. Reference: diffusers' `FirstBlockCacheConfig`, `TaylorSeerCacheConfig`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..flux import Flux
from ..images import check_number
from ..networks.mmdit import KeysValues
from .around import around
from .distributed import add_up

METHODS: dict[str, dict] = {"first_block": {"threshold": 0.05}, "taylor": {"interval": 5, "warmup": 3, "order": 1}}


def cache(flux: Flux, method: str = "first_block", *, threshold: float | None = None, interval: int | None = None,
          warmup: int | None = None, order: int | None = None) -> Flux:
    """The model that computes only a part of its steps in full.

    first_block: threshold, in [0, 10] (default 0.05); 0 is the model itself. taylor: after `warmup` steps (default 3) every
    `interval`-th is computed (default 5; 1 is the model itself), from whose differences up to `order` the others follow (default 1).
    Raises ValueError for other values, and for a model that has a cache already. LoRAs come before the cache."""
    if method not in METHODS:
        raise ValueError(f"there is no cache {method!r}: expected one of {', '.join(METHODS)}")
    given = {"threshold": threshold, "interval": interval, "warmup": warmup, "order": order}
    settings = METHODS[method] | {name: value for name, value in given.items() if value is not None}
    if unknown := settings.keys() - METHODS[method].keys():
        raise ValueError(f"the cache {method!r} has no {min(unknown)}: expected {', '.join(METHODS[method])}")
    limits = {"threshold": (0, 10), "interval": (1, 1000), "warmup": (1, 1000), "order": (0, 10)}
    settings = {name: check_number(name, value, *limits[name], whole=name != "threshold") for name, value in settings.items()}
    for feature in ("cached", "distributed"):
        if hasattr(flux.mmdit, feature):
            raise ValueError(f"this model is {feature} already: cache the model as it was before")
    if settings.get("threshold") == 0 or settings.get("interval") == 1:
        return flux
    mmdit = {"first_block": first_block, "taylor": taylor}[method](flux.mmdit, **settings)
    mmdit.cached = method
    return replace(flux, mmdit=mmdit)


class Streams:
    """A memory for each stream of prompts of each call, which goes when the call's encoded prompts go.

    Note: a stream is known by its tensor `vec`, the same in all steps: the positive and the negative pass have different ones. Whoever
    paints twice with one tensor begins again where the time rises."""

    def __init__(self, new: type):
        self.new, self.known = new, WeakIdKeyDictionary()

    def of(self, vec: Tensor, t: Tensor):
        stream, time = self.known.get(vec), float(t[0])
        if stream is None or time > stream.time:
            stream = self.known[vec] = self.new()
        stream.time = time
        return stream


# ---------------------------------------------------------------------------------------------------------- first block


class Remembered:
    """Of one stream: what the first block added in the last full step, and the other blocks after it: (B, N, hidden)."""

    first: Tensor | None = None
    others: Tensor | None = None
    skip: bool = False                                      # whether this step leaves the other blocks out


class FirstBlock:
    """What becomes of the transformer and its parts."""

    def __init__(self, threshold: float):
        self.threshold, self.streams = threshold, Streams(Remembered)

    def transformer(self, call, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, guidance: Tensor | None, img_ids: Tensor,
                    txt_ids: Tensor, residuals: Sequence[Tensor | None] | None = None,
                    image_kv: Sequence[KeysValues] | None = None) -> Tensor:
        self.now = self.streams.of(vec, t)
        # Note: the residuals of ControlNets are this step's, also where blocks are left out, so they are no part of what is remembered.
        self.given = sum(residual for residual in residuals or () if residual is not None)
        v = call(img, txt, vec, t, guidance, img_ids, txt_ids, residuals, image_kv)
        del self.now, self.given, self.start
        return v

    def first(self, call, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, kv: KeysValues = ()) -> tuple[Tensor, Tensor]:
        out, txt = call(img, txt, vec, pe, kv)
        added = out - img
        self.now.skip = self.now.first is not None and change(added, self.now.first) <= self.threshold
        if not self.now.skip:
            self.now.first = added
        self.start = out + self.given
        return out, txt

    def double(self, call, img: Tensor, txt: Tensor, *inputs) -> tuple[Tensor, Tensor]:
        return (img, txt) if self.now.skip else call(img, txt, *inputs)

    def single(self, call, x: Tensor, *inputs) -> Tensor:
        return x if self.now.skip else call(x, *inputs)

    def last(self, call, img: Tensor, vec: Tensor) -> Tensor:
        if self.now.skip:
            img = img + self.now.others
        else:
            self.now.others = img - self.start
        return call(img, vec)


def change(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / mean |before|; of the whole picture also where each process has a part of it."""
    difference, size = add_up(torch.stack([x.abs().sum(dtype=torch.float32) for x in (now - before, before)])).tolist()
    return difference / size if size else math.inf


def first_block(mmdit: nn.Module, threshold: float) -> nn.Module:
    cache = FirstBlock(threshold)
    first, *doubles = mmdit.double_blocks
    return around(
        mmdit, cache.transformer, final_layer=around(mmdit.final_layer, cache.last),
        double_blocks=nn.ModuleList([around(first, cache.first), *(around(block, cache.double) for block in doubles)]),
        single_blocks=nn.ModuleList(around(block, cache.single) for block in mmdit.single_blocks))


# --------------------------------------------------------------------------------------------------------------- Taylor


class Series:
    """Of one stream: the velocity's factors f_0, f_1, ... at the last full step, float32."""

    def __init__(self):
        self.step, self.full, self.factors = -1, 0, []

    def update(self, v: Tensor, order: int) -> None:
        factors = [v.float()]
        for before in self.factors[:order]:
            factors.append((factors[-1] - before) / (self.step - self.full))
        self.factors, self.full = factors, self.step

    def predict(self) -> Tensor:
        delta = self.step - self.full
        return sum(factor * (delta**k / math.factorial(k)) for k, factor in enumerate(self.factors))


def taylor(mmdit: nn.Module, interval: int, warmup: int, order: int) -> nn.Module:
    streams = Streams(Series)

    def transformer(call, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, *inputs, **named) -> Tensor:
        series = streams.of(vec, t)
        series.step += 1
        if series.step >= warmup and (series.step - warmup - 1) % interval:
            return series.predict().to(img.dtype)
        v = call(img, txt, vec, t, *inputs, **named)
        series.update(v, order)
        return v

    return around(mmdit, transformer)
