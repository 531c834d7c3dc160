"""Modulation ahead of time: what time, guidance and pooled prompt do to the transformer is computed before its first step.

    as usual         each step:    vec = time + guidance + prompt,    each block: shift, scale, gate = W silu(vec)
    ahead of time    each call:    the same for all of its steps      each block: looks its own up

The layers W are 27% of FLUX.1-dev, yet they act on one vector a picture, not on its tokens. Kept apart, they can stay where memory
is plentiful, and the transformer that runs step by step has 16.1 GiB instead of 22.2 (bfloat16). Each step keeps its own product, so
the picture is the same bit for bit; what is looked up takes 2 MB a step and picture.

Seam: model -> model. `generate` does it for a model whose modulation is apart; `offload` sets it apart, since there it saves memory.
A model that lies on its device as a whole would save none, and is left alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..flux import Flux
from ..networks.mmdit import MMDiT
from .around import with_parts

LIMIT = 128                # vectors (steps x pictures) that are ahead of time at once: 270 MB of them for FLUX.1 in bfloat16

Row = list[tuple[Tensor, ...] | Tensor]                     # what each modulation layer says at one time


def precompute_modulation(flux: Flux) -> Flux:
    """The model whose modulation layers are apart from its transformer, in `flux.mmdit.apart`, and run before the steps.

    Its parts share their weights with the given model, which stays as it is. LoRAs of these layers are added before."""
    if hasattr(flux.mmdit, "apart"):
        return flux
    mmdit, layers = flux.mmdit, []

    def apart(layer: nn.Module) -> nn.Module:
        layers.append(layer)
        return LookUp(len(layers) - 1)

    double = [with_parts(block, img_mod=apart(block.img_mod), txt_mod=apart(block.txt_mod)) for block in mmdit.double_blocks]
    single = [with_parts(block, modulation=apart(block.modulation)) for block in mmdit.single_blocks]
    final = with_parts(mmdit.final_layer, adaLN_modulation=apart(mmdit.final_layer.adaLN_modulation))
    embedders = {name: LookUp() for name in ("time_in", "guidance_in", "vector_in") if hasattr(mmdit, name)}
    rest = with_parts(mmdit, double_blocks=nn.ModuleList(double), single_blocks=nn.ModuleList(single), final_layer=final, **embedders)
    rest.conditioning = look_up
    rest.apart = (Modulations(mmdit, layers),)              # Note: in a tuple, or it would be a part of the transformer again
    return replace(flux, mmdit=rest)


class Embedders(nn.Module):
    """Time, guidance and pooled prompt -> the conditioning vector (B, hidden) of each time."""

    conditioning = MMDiT.conditioning

    def __init__(self, mmdit: MMDiT):
        super().__init__()
        self.config, self.time_in, self.vector_in = mmdit.config, mmdit.time_in, mmdit.vector_in
        if self.config.guidance_embed:
            self.guidance_in = mmdit.guidance_in

    def forward(self, vec: Tensor, times: Sequence[Tensor], guidance: Tensor | None) -> list[Tensor]:
        return [self.conditioning(vec, t, guidance) for t in times]


class Modulations(nn.Module):
    """Pooled prompts vec (B, vec_in_dim), times, each (B,), and guidance (B,) -> for each time, what each layer says."""

    def __init__(self, mmdit: MMDiT, layers: list[nn.Module]):
        super().__init__()
        self.embedders, self.layers = Embedders(mmdit), nn.ModuleList(layers)

    def forward(self, vec: Tensor, times: Sequence[Tensor], guidance: Tensor | None) -> list[Row]:
        vecs = self.embedders(vec, times, guidance)
        # Note: time by time, as the steps would; one product for all of them would round otherwise.
        return [list(row) for row in zip(*([layer(vec) for vec in vecs] for layer in self.layers))]

    def __deepcopy__(self, _) -> "Modulations":
        return self                                         # a copy of the transformer, such as one with LoRAs, shares it


class LookUp(nn.Module):
    """Stands where a modulation layer was, or what makes the vector it acts on."""

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number = number

    def forward(self, row: Row) -> tuple[Tensor, ...] | Tensor:
        return row[self.number]

    def __getattr__(self, name: str):
        if name in ("lin", "1", "in_layer", "out_layer"):   # as a LoRA asks for what it is to change
            raise ValueError("the modulation of this transformer is apart from it: add LoRAs of its layers before it is precomputed")
        return super().__getattr__(name)


class Ahead:
    """All that the modulation says in a call; enters the transformer in the place of the pooled prompts."""

    def __init__(self, layers: Modulations, vec: Tensor, guidance: float, ts: Sequence[float]):
        self.layers, self.vec, self.rows = layers, vec, {}
        self.guidance = self.per_picture(guidance) if layers.embedders.config.guidance_embed else None
        self.times = [self.per_picture(t) for t in ts[:-1]]                     # nothing is asked at the last one

    def __len__(self) -> int:
        return len(self.vec)

    def per_picture(self, value: float) -> Tensor:
        return torch.full((len(self.vec),), value, dtype=self.vec.dtype, device=self.vec.device)

    def at(self, t: Tensor) -> Row:
        """The row of the time t (B,); with it come those of the times after it, as many as the limit allows."""
        if (time := float(t[0])) not in self.rows:
            times = [t, *(later for later in self.times if later[0] < t[0])][:max(1, LIMIT // len(self))]
            self.rows = {float(t[0]): row for t, row in zip(times, self.layers(self.vec, times, self.guidance))}
        return self.rows[time]


def modulations(mmdit: MMDiT, vec: Tensor, guidance: float, ts: Sequence[float]) -> Tensor | Ahead:
    """What the transformer is to be given as `vec` along the times ts: vec itself (B, ·), unless its modulation is apart."""
    return Ahead(*mmdit.apart, vec, guidance, ts) if hasattr(mmdit, "apart") else vec


def look_up(vec: Ahead, t: Tensor, guidance: Tensor | None) -> Row:
    """In the place of `MMDiT.conditioning`."""
    if not isinstance(vec, Ahead):
        raise ValueError("this transformer's modulation is apart: give it modulations(mmdit, vec, guidance, ts) as vec")
    return vec.at(t)
