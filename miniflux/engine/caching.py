"""Steps that are not computed: neighbouring steps resemble each other, so a part of one is
remembered from another.

    flux = cache(flux, "first_block", threshold=0.05)
    flux = cache(flux, "taylor", interval=5)

first_block     Every step runs the first block. If what it adds to the image tokens has hardly
                changed since the last full step,

                    mean |r - r_last| <= threshold · mean |r_last|,      r = block_0(img) - img

                the other blocks are skipped, and what they added then is added again
                (ParaAttention's first-block cache, after TeaCache, arXiv:2411.19108).

taylor          The first steps and then every `interval`-th are computed. Between them the velocity
                v follows its Taylor series,

                    v(s + Δ) = Σ_k Δᵏ / k! · f_k,        f_0 = v,
                    f_k+1 = (f_k - f_k at the last full step) / steps between

                (TaylorSeer, arXiv:2503.06923, in diffusers' lite form, which predicts only what
                leaves the network).

Both passes of true CFG have a memory of their own, and so has each call. `python -m miniflux.bench
caching` compares this with simply taking fewer steps. Seam: model -> model.
Reference: diffusers' `FirstBlockCacheConfig`, `TaylorSeerCacheConfig`.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_number
from ..flux import Flux
from ..networks.mmdit import MMDiT, MMDiTInputs
from .distributed import all_reduce_sum
from .features import check_order, mark
from .wrapping import shallow_copy, wrap_forward, wrap_in_place

METHODS: dict[str, dict] = {
    "first_block": {"threshold": 0.05},
    "taylor": {"interval": 5, "warmup": 3, "order": 1},
}


def cache(flux: Flux, method: str = "first_block", *, threshold: float | None = None,
          interval: int | None = None, warmup: int | None = None, order: int | None = None) -> Flux:
    """The model that computes only a part of its steps in full.

    first_block: threshold, in [0, 10] (default 0.05); 0 is the model itself. taylor: after `warmup`
        steps (default 3) every `interval`-th is computed (default 5; 1 is the model itself), from
        whose differences up to `order` the others follow (default 1). Raises ValueError for other
        values, and for a model that has a cache already. LoRAs come before the cache."""
    if method not in METHODS:
        raise ValueError(f"there is no cache {method!r}: expected one of {', '.join(METHODS)}")
    given = {"threshold": threshold, "interval": interval, "warmup": warmup, "order": order}
    settings = METHODS[method] | {name: value for name, value in given.items() if value is not None}
    if unknown := settings.keys() - METHODS[method].keys():
        raise ValueError(f"the cache {method!r} has no {min(unknown)}: "
                         f"expected {', '.join(METHODS[method])}")
    limits = {"threshold": (0, 10), "interval": (1, 1000), "warmup": (1, 1000), "order": (0, 10)}
    for name, value in settings.items():
        settings[name] = check_number(name, value, *limits[name], whole=name != "threshold")
    check_order(flux, "cached")
    if settings.get("threshold") == 0 or settings.get("interval") == 1:
        return flux
    mmdit = {"first_block": first_block, "taylor": taylor}[method](flux.mmdit, **settings)
    mark(mmdit, "cached")
    return replace(flux, mmdit=mmdit)


class CacheStates:
    """What a cache remembers of each prompt that is being sampled, in the memory of that prompt's
    velocity.

    Note: both passes of true CFG, and all calls, have velocities and so memories of their own. A
        velocity that is used twice begins anew where the time rises."""

    def __init__(self, new: type):
        self.new = new

    def state_for(self, inputs: MMDiTInputs):
        states = {} if inputs.memory is None else inputs.memory.states
        time = float(inputs.t[0]) if inputs.time is None else inputs.time
        state = states.get(self)
        if state is None or time > state.time:
            state = states[self] = self.new()
        state.time = time
        return state


# -------------------------------------------------------------------------------------- first block


class BlockCache:
    """For one prompt: what the first block added in the last full step, and the others after it,
    both (B, N, hidden)."""

    first: Tensor | None = None
    others: Tensor | None = None


class FirstBlock:
    """Wraps `MMDiT.run_blocks`."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.states = CacheStates(BlockCache)

    def __call__(self, mmdit: MMDiT, run_blocks: Callable, img: Tensor, txt: Tensor, vec: Tensor,
                 pe: Tensor, inputs: MMDiTInputs) -> Tensor:
        state = self.states.state_for(inputs)
        kv = inputs.image_kv[0] if inputs.image_kv else ()
        out, txt = mmdit.double_blocks[0](img, txt, vec, pe, kv)  # (B, N, hidden), (B, L, hidden)
        added = out - img
        # Note: the residuals of ControlNets are this step's even where blocks are skipped, so none
        # is remembered.
        residuals = [0 if residual is None else residual for residual in inputs.residuals or (0,)]
        skip = state.first is not None and relative_change(added, state.first) <= self.threshold
        if skip:
            return out + sum(residuals) + state.others
        end = run_blocks(out + residuals[0], txt, vec, pe, inputs, first=1)     # (B, N, hidden)
        state.first = added
        state.others = end - (out + sum(residuals))
        return end


def relative_change(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / mean |before|; of the whole image also where each process has a part of
    it.

    Note: this reads one number back from the device in each step: whether to run the blocks is
        decided by the host."""
    sums = torch.stack([x.abs().sum(dtype=torch.float32) for x in (now - before, before)])
    difference, size = all_reduce_sum(sums).unbind()
    return float(difference / size)  # NaN or infinite, and so no resemblance, where all is 0


def first_block(mmdit: MMDiT, threshold: float) -> MMDiT:
    copied = shallow_copy(mmdit)
    wrap_in_place(copied, "run_blocks", FirstBlock(threshold))
    return copied


# ------------------------------------------------------------------------------------------- Taylor


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


class Taylor:
    """Wraps the transformer's `forward`."""

    def __init__(self, interval: int, warmup: int, order: int):
        self.interval = interval
        self.warmup = warmup
        self.order = order
        self.states = CacheStates(Series)

    def __call__(self, mmdit: MMDiT, call: Callable, inputs: MMDiTInputs) -> Tensor:
        series = self.states.state_for(inputs)
        series.step += 1
        if series.step >= self.warmup and (series.step - self.warmup - 1) % self.interval:
            return series.predict().to(inputs.img.dtype)
        v = call(inputs)  # (B, N, out_channels)
        series.update(v, self.order)
        return v


def taylor(mmdit: MMDiT, interval: int, warmup: int, order: int) -> MMDiT:
    return wrap_forward(mmdit, Taylor(interval, warmup, order))
