"""The FLUX.1 autoencoder: images (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H/8, W/8).

A convolutional encoder predicts the mean and the log-variance of a Gaussian for every latent
pixel; a mirrored decoder turns latents back into an image (a VAE, Kingma & Welling 2013, as in
latent diffusion, Rombach et al. 2021, arXiv:2112.10752). Encoding returns the mean, as in the
original repository, and draws no random numbers. An affine map gives the latents a variance of
about one:

    z     = (mean - shift_factor) * scale_factor,       mean, log_variance = encoder(image)
    image = decoder(z / scale_factor + shift_factor)

Attributes are named like the tensors of `ae.safetensors`. Reference:
`src/flux/modules/autoencoder.py` of the original repository.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .attention_backends import chunked
from .layers import clamp_fp16


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are the official one's (83,819,683 parameters)."""

    ch: int = 128                              # channels of the first level
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)    # channels of each level, as multiples of `ch`
    num_res_blocks: int = 2                    # per level of the encoder; one more in the decoder
    z_channels: int = 16
    num_groups: int = 32                       # of every GroupNorm
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downscale(self) -> int:
        """Side of the square of pixels that becomes one latent pixel: every level but the last
        halves the image."""
        return 2 ** (len(self.ch_mult) - 1)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, in, h, w) -> (B, out, h, w).

    Where the numbers of channels differ, x goes through a 1x1 convolution before the sum."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Note: nested, as a name for the first half would keep its activations in memory.
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))   # (B, out, h, w)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)                                            # (B, out, h, w)
        # Note: float16 may overflow in a sum. From one infinity, the next norm would make NaN in
        # the whole image, which is then black.
        return clamp_fp16(x + y)


class AttnBlock(nn.Module):
    """x + proj(attention(norm(x))) with one head, over all latent pixels: (B, C, h, w).

    The projections are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        def tokens(conv: nn.Conv2d) -> Tensor:
            return conv(normed).flatten(2).transpose(1, 2)[:, None].contiguous()

        normed = self.norm(x)
        y = chunked(tokens(self.q), tokens(self.k), tokens(self.v))             # (B, 1, h·w, C)
        y = y[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])                   # (B, C, h, w)
        return clamp_fp16(x + self.proj_out(y))


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2) by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Note: the padding is asymmetric: one row below and one column to the right.
        return clamp_fp16(self.conv(F.pad(x, (0, 1, 0, 1))))                    # (B, C, h/2, w/2)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")                  # (B, C, 2h, 2w)
        return clamp_fp16(self.conv(x))


class Middle(nn.Module):
    """What stands between the levels and the latents: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then a downsample (encoder) or upsample (decoder)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int,
                 downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
            for i in range(blocks))
        if downsample:
            self.downsample = Downsample(out_channels)
        if upsample:
            self.upsample = Upsample(out_channels)

    def layers(self) -> list[nn.Module]:
        """The layers in their order.

        Note: the caller runs them one by one. A call of the whole level would keep the level's
        input in memory until its end."""
        resize = [getattr(self, name) for name in ("downsample", "upsample") if hasattr(self, name)]
        return [*self.block, *resize]


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, 2·z_channels, H/8, W/8): mean, then log-variance."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last, groups = len(widths) - 1, config.num_groups
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], config.num_res_blocks, groups,
                  downsample=i < last)
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
    """Latents (B, z_channels, h, w) -> image (B, 3, 8h, 8w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last, groups = len(widths) - 1, config.num_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        # Note: up[i] has the resolution of down[i], so the decoder goes through them backwards.
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], widths[i], config.num_res_blocks + 1, groups,
                  upsample=i > 0)
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
    """Encoder and decoder, with the affine map between the encoder's mean and the latents."""

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> z (B, 16, H/8, W/8), the mean of the posterior."""
        mean, _log_variance = self.encoder(image).chunk(2, dim=1)
        return (mean - self.config.shift_factor) * self.config.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 16, h, w) -> image (B, 3, 8h, 8w), mostly in [-1, 1]."""
        return self.decoder(z / self.config.scale_factor + self.config.shift_factor)
