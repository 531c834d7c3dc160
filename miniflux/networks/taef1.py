"""TAEF1's decoder: latents -> images by a few plain convolutions, fast enough for previews.

Attributes are named like the tensors of `madebyollin/taef1` in the diffusers layout. Reference:
diffusers' `AutoencoderTiny`.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))): (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class TAEF1Decoder(nn.Module):
    """Latents (B, 16, h, w) -> images (B, 3, 8h, 8w) in about [0, 1]; 1,229,443 parameters."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers = [nn.Conv2d(16, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):                                      # each doubles height and width
            layers += [Block(width), Block(width), Block(width)]
            layers += [nn.Upsample(scale_factor=2)]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers((z / 3).tanh() * 3)                                  # (B, 3, 8h, 8w)
