"""Modulation ahead of time: what time, guidance and pooled prompt do to the transformer is computed
before its first step.

    as usual       each step:   vec = time + guidance + prompt
                   each block:  shift, scale, gate = W silu(vec)
    precomputed    each call:   the same for all of its steps
                   each block:  takes its own from the table

The layers W are 27% of FLUX.1-dev, yet they act on one vector a picture, not on its tokens. Kept
apart, they can stay where memory is plentiful, and the transformer that runs step by step has 16.1
GiB instead of 22.2 (bfloat16). Each step keeps its own product, so the picture is the same bit for
bit; what is looked up takes 2 MB a step and picture.

Seam: model -> model. `generate` does it for a model whose modulation is apart; `offload` sets it
    apart, since there it saves memory. A model that lies on its device as a whole would save none,
    and is left alone.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..flux import Flux
from ..networks.mmdit import MMDiT, MMDiTInputs
from .wrapping import shallow_copy, wrap_in_place

# vectors (steps x pictures) that are ahead of time at once: 270 MB of them for FLUX.1 in bfloat16
LIMIT = 128

ModulationRow = list[tuple[Tensor, ...] | Tensor]  # what each modulation layer says at one time


def precompute_modulation(flux: Flux) -> Flux:
    """The model whose modulation layers are apart from its transformer, in
    `flux.mmdit.precomputed`, and run before the steps.

    Its parts share their weights with the given model, which stays as it is. LoRAs of these layers
    are added before."""
    if hasattr(flux.mmdit, "precomputed"):
        return flux
    mmdit, layers = flux.mmdit, []

    def precomputed(layer: nn.Module) -> nn.Module:
        layers.append(layer)
        return PrecomputedLayer(len(layers) - 1)

    parts = {
        "double_blocks": nn.ModuleList(
            shallow_copy(block, img_mod=precomputed(block.img_mod),
                         txt_mod=precomputed(block.txt_mod))
            for block in mmdit.double_blocks),
        "single_blocks": nn.ModuleList(
            shallow_copy(block, modulation=precomputed(block.modulation))
            for block in mmdit.single_blocks),
        "final_layer": shallow_copy(
            mmdit.final_layer, adaLN_modulation=precomputed(mmdit.final_layer.adaLN_modulation)),
    }
    for name in ("time_in", "guidance_in", "vector_in"):
        if hasattr(mmdit, name):
            parts[name] = PrecomputedLayer()
    rest = shallow_copy(mmdit, **parts)
    wrap_in_place(rest, "conditioning", lookup_conditioning)
    wrap_in_place(rest, "prepare", prepare)
    wrap_in_place(rest, "forward", look_up_row)
    # Note: in a tuple, or it would be a part of the transformer again
    rest.precomputed = (Modulations(mmdit, layers),)
    return replace(flux, mmdit=rest)


class Embedders(nn.Module):
    """Time, guidance and pooled prompt -> the conditioning vector (B, hidden) of each time."""

    conditioning = MMDiT.conditioning

    def __init__(self, mmdit: MMDiT):
        super().__init__()
        self.config, self.time_in, self.vector_in = mmdit.config, mmdit.time_in, mmdit.vector_in
        if self.config.guidance_embed:
            self.guidance_in = mmdit.guidance_in

    def forward(self, vec: Tensor, times: Sequence[Tensor],
                guidance: Tensor | None) -> list[Tensor]:
        return [self.conditioning(vec, t, guidance) for t in times]


class Modulations(nn.Module):
    """Pooled prompts vec (B, vec_in_dim), times, each (B,), and guidance (B,) -> for each time,
    what each layer says."""

    def __init__(self, mmdit: MMDiT, layers: list[nn.Module]):
        super().__init__()
        self.embedders, self.layers = Embedders(mmdit), nn.ModuleList(layers)

    def forward(self, vec: Tensor, times: Sequence[Tensor],
                guidance: Tensor | None) -> list[ModulationRow]:
        vecs = self.embedders(vec, times, guidance)
        # Note: time by time, as the steps would; one product for all of them would round otherwise.
        return [list(row) for row in zip(*([layer(vec) for vec in vecs] for layer in self.layers))]

    def __deepcopy__(self, memo: dict) -> "Modulations":
        # Note: a copy that shares the transformer's weights, such as one with LoRAs, shares these
        # too: its memo holds weights that are their own copies.
        if any(isinstance(value, Tensor) and id(value) == key for key, value in memo.items()):
            return self
        copied = memo[id(self)] = shallow_copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


class PrecomputedLayer(nn.Module):
    """Stands where a modulation layer was, or what makes the vector it acts on."""

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number = number

    def forward(self, row: ModulationRow) -> tuple[Tensor, ...] | Tensor:
        return row[self.number]

    def __getattr__(self, name: str):
        if name in ("lin", "1", "in_layer", "out_layer"):  # as a LoRA asks for what it is to change
            raise ValueError("the modulation of this transformer is apart from it: "
                             "add LoRAs of its layers before it is precomputed")
        return super().__getattr__(name)


class PrecomputedModulation:
    """The modulation of one call; enters the transformer in the place of the pooled prompts."""

    def __init__(self, layers: Modulations, pooled: Tensor, guidance: float, ts: Sequence[float]):
        self.layers = layers
        self.pooled = pooled
        self.guidance = self.per_image(guidance) if layers.embedders.config.guidance_embed else None
        self.times = list(ts[:-1])  # the last one, 0, is never asked for
        self.rows: dict[float, ModulationRow] = {}

    def __len__(self) -> int:
        return len(self.pooled)

    def per_image(self, value: float) -> Tensor:
        return torch.full((len(self),), value, dtype=self.pooled.dtype, device=self.pooled.device)

    def at(self, inputs: MMDiTInputs) -> ModulationRow:
        """The row of a step; with it come those of the times after it, as many as the limit
        allows."""
        if inputs.time is None:
            row, = self.layers(self.pooled, [inputs.t], self.guidance)
            return row
        if inputs.time not in self.rows:
            times = [inputs.time, *(t for t in self.times if t < inputs.time)]
            times = times[:max(1, LIMIT // len(self))]
            rows = self.layers(self.pooled, [self.per_image(t) for t in times], self.guidance)
            self.rows = dict(zip(times, rows))
        return self.rows[inputs.time]


def prepare(mmdit: MMDiT, call: Callable, pooled: Tensor, guidance: float,
            ts: Sequence[float]) -> PrecomputedModulation:
    """Wraps `MMDiT.prepare`."""
    return PrecomputedModulation(*mmdit.precomputed, pooled, guidance, ts)


def look_up_row(mmdit: MMDiT, call: Callable, inputs: MMDiTInputs) -> Tensor:
    """Wraps the transformer's `forward`."""
    if not isinstance(inputs.pooled, PrecomputedModulation):
        raise ValueError("the modulation of this transformer is precomputed: "
                         "give it mmdit.prepare(pooled, guidance, ts) as pooled")
    return call(inputs._replace(pooled=inputs.pooled.at(inputs)))


def lookup_conditioning(mmdit: MMDiT, call: Callable, row: ModulationRow, t: Tensor,
                        guidance: Tensor | None) -> ModulationRow:
    """Wraps `MMDiT.conditioning`: the row stands where the conditioning vector would, and each
    layer takes its own of it."""
    return row
