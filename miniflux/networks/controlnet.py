"""ControlNet: a copy of the transformer's first blocks that reads a control picture and corrects the transformer.

    residual_i = W_i · (image tokens after block i)         added to the transformer's image tokens after its own blocks

The copy sees the same noisy picture plus the control picture's tokens (Zhang et al. 2023, arXiv:2302.05543); every W_i is zero
when training begins, so that it begins by changing nothing. Two families are in use:

    InstantX, Shakker      the control picture as latents; residual i serves a whole interval of blocks; a union net is told its
                           kind of control (`modes`) by one more text token
    XLabs                  the control picture as pixels, through eight convolutions (`hint`); residual i serves the blocks
                           i, i + n, i + 2n, ...

Attributes are named like the MMDiT's, and like what diffusers adds to them. Reference: diffusers' `FluxControlNetModel`;
`src/flux/controlnet.py` of XLabs-AI's x-flux.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import rope_table
from .mmdit import MMDiT, MMDiTConfig


@dataclass(frozen=True)
class ControlNetConfig(MMDiTConfig):
    """Sizes of a ControlNet; the defaults are those of InstantX's Union for FLUX.1-dev (3,301,956,608 parameters)."""

    depth: int = 5
    depth_single_blocks: int = field(default=10, metadata={"least": 0})
    modes: int = field(default=10, metadata={"least": 0})  # kinds of control that a union net knows, 0 for other nets
    hint: bool = False                     # whether it reads the control picture's pixels (XLabs) rather than its latents


def hint_block(channels: int) -> nn.Sequential:
    """XLabs' eye: pixels (B, 3, H, W) in [-1, 1] -> (B, channels, H/8, W/8)."""
    layers: list[nn.Module] = []
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        layers += [nn.Conv2d(channels if i else 3, channels, 3, stride=stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])                      # Note: nothing follows the last convolution


class ControlNet(MMDiT):
    """An MMDiT that gives a residual after each of its blocks instead of a velocity at its end."""

    def __init__(self, config: ControlNetConfig = ControlNetConfig()):
        super().__init__(config)
        del self.final_layer
        hidden = config.hidden_size
        self.controlnet_x_embedder = nn.Linear(config.in_channels, hidden)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.depth))
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.depth_single_blocks))
        if config.modes:
            self.controlnet_mode_embedder = nn.Embedding(config.modes, hidden)
        if config.hint:
            self.input_hint_block = hint_block(config.in_channels // 4)

    def forward(self, img: Tensor, control: Tensor, mode: int | None, txt: Tensor, vec: Tensor, t: Tensor, guidance: Tensor | None,
                img_ids: Tensor, txt_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As the MMDiT's, with control (B or 1, N, in_channels), the control picture's tokens, and mode, its kind for a union net
        -> a residual (B, N, hidden) for each double block and for each single block."""
        vec = self.conditioning(vec, t, guidance)                               # (B, hidden)
        img = self.img_in(img) + self.controlnet_x_embedder(control)            # (B, N, hidden)
        txt = self.txt_in(txt)                                                  # (B, L, hidden)
        if self.config.modes:
            kind = self.controlnet_mode_embedder.weight[mode].expand(len(txt), 1, -1)
            txt, txt_ids = torch.cat([kind, txt], dim=1), torch.cat([txt_ids[:1], txt_ids])  # (B, 1+L, hidden)
        pe = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim, self.config.theta)
        doubles, singles = [], []
        for block, out in zip(self.double_blocks, self.controlnet_blocks):
            img, txt = block(img, txt, vec, pe)
            doubles.append(out(img))                                            # (B, N, hidden)
        x = torch.cat([txt, img], dim=1)
        for block, out in zip(self.single_blocks, self.controlnet_single_blocks):
            x = block(x, vec, pe)
            singles.append(out(x[:, txt.shape[1]:]))                            # (B, N, hidden)
        return doubles, singles


def assign(residuals: list, depth: int, repeat: bool) -> list:
    """Which residual each of `depth` blocks gets: in intervals of equal length, or by turns; None for all where there are none.

    >>> assign(["a", "b"], 5, repeat=False), assign(["a", "b"], 5, repeat=True)
    (['a', 'a', 'a', 'b', 'b'], ['a', 'b', 'a', 'b', 'a'])

    Note: the interval is rounded up, so the last residuals may serve no block: the sixth of six for 19 blocks does not."""
    if not residuals:
        return [None] * depth
    interval = math.ceil(depth / len(residuals))
    return [residuals[i % len(residuals) if repeat else i // interval] for i in range(depth)]
