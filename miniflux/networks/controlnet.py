"""ControlNet: a copy of the transformer's first blocks that corrects it by a control image.

    residual_i = W_i (image tokens after block i)

Each residual is added to the transformer's image tokens after one or several of its own blocks. The
copy is given the same noisy image plus the tokens of the control image (Zhang et al. 2023,
arXiv:2302.05543). Every W_i is zero when training begins, so that at first nothing changes. Two
families are in use:

    InstantX, Shakker   The control image enters as latents. Each residual serves an interval of
                        neighbouring blocks. In a union net, one more text token stands for the kind
                        of control (`modes`).
    XLabs               The control image enters as pixels, through eight convolutions (`hint`).
                        Residual i of n serves the blocks i, i + n, i + 2n, ...

Attributes are named like the MMDiT's, and like what diffusers adds to them. Reference: diffusers'
`FluxControlNetModel`; `src/flux/controlnet.py` of XLabs-AI's x-flux.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import rope_table
from .mmdit import MMDiT, MMDiTConfig


@dataclass(frozen=True)
class ControlNetConfig(MMDiTConfig):
    """Sizes of a ControlNet; the defaults are those of InstantX's Union for FLUX.1-dev.

    They make 3,301,956,608 parameters."""

    depth: int = 5
    depth_single_blocks: int = field(default=10, metadata={"least": 0})
    modes: int = field(default=10, metadata={"least": 0})   # kinds of control of a union net; or 0
    hint: bool = False                 # whether pixels enter (XLabs) instead of latents


def hint_block(channels: int) -> nn.Sequential:
    """XLabs' convolutions: pixels (B, 3, H, W) in [-1, 1] -> (B, channels, H/8, W/8)."""
    layers: list[nn.Module] = []
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        in_channels = 3 if i == 0 else channels
        layers += [nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])                  # Note: nothing follows the last convolution


class ControlNet(MMDiT):
    """An MMDiT that returns a residual after each of its blocks instead of a velocity."""

    def __init__(self, config: ControlNetConfig = ControlNetConfig()):
        super().__init__(config)
        del self.final_layer
        hidden = config.hidden_size
        self.controlnet_x_embedder = nn.Linear(config.in_channels, hidden)
        self.controlnet_blocks = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(config.depth))
        self.controlnet_single_blocks = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(config.depth_single_blocks))
        if config.modes:
            self.controlnet_mode_embedder = nn.Embedding(config.modes, hidden)
        if config.hint:
            self.input_hint_block = hint_block(config.in_channels // 4)

    def forward(self, img: Tensor, control: Tensor, mode: int | None, txt: Tensor, pooled: Tensor,
                t: Tensor, guidance: Tensor | None, img_ids: Tensor, txt_ids: Tensor
                ) -> tuple[list[Tensor], list[Tensor]]:
        """The residuals (B, N, hidden) of the double blocks, and those of the single blocks.

        control: the control image as tokens (B or 1, N, in_channels).
        mode: the kind of control for a union net, else None.
        The others are those of `MMDiTInputs`."""
        vec = self.conditioning(pooled, t, guidance)                            # (B, hidden)
        img = self.img_in(img) + self.controlnet_x_embedder(control)            # (B, N, hidden)
        txt = self.txt_in(txt)                                                  # (B, L, hidden)
        if self.config.modes:
            kind = self.controlnet_mode_embedder.weight[mode].expand(len(txt), 1, -1)
            txt = torch.cat([kind, txt], dim=1)                                 # (B, 1+L, hidden)
            txt_ids = torch.cat([txt_ids[:1], txt_ids])                         # (1+L, 3)
        pe = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim, self.config.theta)
        doubles, singles = [], []
        for block, out in zip(self.double_blocks, self.controlnet_blocks):
            img, txt = block(img, txt, vec, pe)
            doubles.append(out(img))                                            # (B, N, hidden)
        x = torch.cat([txt, img], dim=1)                                        # (B, L+N, hidden)
        for block, out in zip(self.single_blocks, self.controlnet_single_blocks):
            x = block(x, vec, pe)
            singles.append(out(x[:, txt.shape[1]:]))                            # (B, N, hidden)
        return doubles, singles


def assign(residuals: list, depth: int, repeat: bool) -> list:
    """The residual of each of the transformer's `depth` blocks.

    repeat: whether they repeat in turn (XLabs), or each serves an interval of neighbouring blocks.
    Returns a list of `depth`; all None where there are no residuals.

    >>> assign(["a", "b"], 5, repeat=False), assign(["a", "b"], 5, repeat=True)
    (['a', 'a', 'a', 'b', 'b'], ['a', 'b', 'a', 'b', 'a'])

    Note: the interval is rounded up, so the last residuals may serve no block: of six residuals
    for 19 blocks, the sixth serves none."""
    if not residuals:
        return [None] * depth
    if repeat:
        return [residuals[i % len(residuals)] for i in range(depth)]
    interval = math.ceil(depth / len(residuals))
    return [residuals[i // interval] for i in range(depth)]
