"""The FLUX.1 autoencoder: pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H/8, W/8) of about unit variance.

A convolutional encoder predicts mean and log-variance of a Gaussian for every latent pixel, a mirrored decoder paints
them back (a VAE, Kingma & Welling 2013, as in latent diffusion, Rombach et al. 2021, arXiv:2112.10752). Here the mean is
taken, as the original repository does: encoding draws no random numbers.

    z = (mean - shift_factor) · scale_factor            picture = decoder(z / scale_factor + shift_factor)

Attributes are named like the tensors of `ae.safetensors`. Reference: `src/flux/modules/autoencoder.py`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .attention_backends import chunked
from .layers import clamp_fp16


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are the official one's (83,819,683 parameters)."""

    ch: int = 128                              # width of the first level
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)    # width of each level; every level but the last halves the picture
    num_res_blocks: int = 2                    # a level of the encoder; the decoder has one more
    z_channels: int = 16
    num_groups: int = 32                       # of every GroupNorm
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downscale(self) -> int:
        """Pixels a side that one latent pixel stands for (8)."""
        return 2 ** (len(self.ch_mult) - 1)


class ResnetBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w): twice GroupNorm, SiLU, 3x3 convolution, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Note: in one expression, so that a name does not keep the first half's pictures alive during the second.
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        # Note: float16 may overflow wherever no norm comes before; the next norm would make of one infinity a picture of no numbers: black.
        return clamp_fp16(h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x))


class AttnBlock(nn.Module):
    """One-headed attention among all latent pixels, residual; q, k, v are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, h·w, C)
        h = chunked(q.contiguous(), k.contiguous(), v.contiguous())             # beyond 2048x1024 pixels in pieces
        return clamp_fp16(x + self.proj_out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])))  # (B, C, h, w)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Note: the padding is asymmetric, one row below and one column to the right.
        return clamp_fp16(self.conv(F.pad(x, (0, 1, 0, 1))))                    # (B, C, h/2, w/2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return clamp_fp16(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))  # (B, C, 2h, 2w)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then (encoder) a downsample or (decoder) an upsample, if any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int,
                 downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
                                   for i in range(blocks))
        if downsample:
            self.downsample = Downsample(out_channels)
        if upsample:
            self.upsample = Upsample(out_channels)

    def layers(self) -> list[nn.Module]:
        """In their order. Note: who calls a whole level keeps its input alive until it ends; layer by layer, only a layer does."""
        return [*self.block, *(getattr(self, name) for name in ("downsample", "upsample") if hasattr(self, name))]


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2·z_channels, H/8, W/8): mean, then log-variance."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        top, groups = len(widths) - 1, config.num_groups
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(Level(widths[max(i - 1, 0)], widths[i], config.num_res_blocks, groups, downsample=i < top)
                                  for i in range(len(widths)))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, 8h, 8w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        top, groups = len(widths) - 1, config.num_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        # Note: up[i] belongs to the resolution of down[i], so the decoder runs through them backwards.
        self.up = nn.ModuleList(Level(widths[min(i + 1, top)], widths[i], config.num_res_blocks + 1, groups, upsample=i > 0)
                                for i in range(len(widths)))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Both halves with the affine map that gives latents unit variance."""

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> z (B, 16, H/8, W/8), the posterior's mean."""
        mean, _log_variance = self.encoder(picture).chunk(2, dim=1)
        return (mean - self.config.shift_factor) * self.config.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 16, h, w) -> (B, 3, 8h, 8w), mostly in [-1, 1]."""
        return self.decoder(z / self.config.scale_factor + self.config.shift_factor)
