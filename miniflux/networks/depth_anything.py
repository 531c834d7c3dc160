"""Depth Anything: an image -> the depth of each pixel (Yang et al. 2024, arXiv:2401.10891;
version 2: arXiv:2406.09414).

    backbone    DINOv2, a vision transformer (Oquab et al. 2023, arXiv:2304.07193):
                patches -> four feature maps
    neck        DPT (Ranftl et al. 2021, arXiv:2103.13413): resizes the maps to 4, 2, 1 and 1/2
                times the resolution of the patches, and fuses them from coarse to fine
    head        convolutions -> one number per pixel

A *relative* model predicts inverse depth (larger is nearer, no unit); a *metric* model predicts
the distance in metres. The transformer layers are CLIP's, with a learned scale on each residual
branch.

Attributes are named like the tensors of `LiheYoung/depth-anything-large-hf`; within a transformer
layer, like CLIP's. Reference: transformers' `DepthAnythingForDepthEstimation`.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIPLayer


@dataclass(frozen=True)
class DepthAnythingConfig:
    """Sizes of the network; the defaults are those of the large model.

    They make 335,315,649 parameters, with a mask token that is not used here."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 518                               # size of the position table, in pixels
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    out_indices: tuple[int, ...] = (21, 22, 23, 24)     # layers, from 1, whose outputs the neck
                                                        # takes; version 2: 5, 12, 18, 24
    neck_hidden_sizes: tuple[int, ...] = (256, 512, 1024, 1024)
    fusion_hidden_size: int = 256
    head_hidden_size: int = 32
    metric: bool = False                                # predicts distance, not inverse depth
    max_depth: float = 1.0                              # multiplies the last activation


class PatchEmbeddings(nn.Module):
    """Images (B, 3, H, W) -> a class token and one token per patch: (B, 1 + N, hidden).

    A learned position is added to each."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        patches = (config.image_size // patch) ** 2
        projection = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, images: Tensor) -> Tensor:
        # Note: the convolution drops the rows and columns that do not fill a patch.
        x = self.patch_embeddings["projection"](images)                         # (B, hidden, h, w)
        positions = self.positions(*x.shape[-2:])                               # (1, 1+h·w, hidden)
        x = x.flatten(2).transpose(1, 2)                                        # (B, N, hidden)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)        # (B, 1+N, hidden)
        return x + positions

    def positions(self, h: int, w: int) -> Tensor:
        """The table (1, 1 + h·w, hidden), resized from its own square grid to h x w patches."""
        table = self.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        if (h, w) == (side, side):
            return table
        # Note: in float32, as half precision shifts the positions.
        grid = table[:, 1:].float().unflatten(1, (side, side))
        grid = grid.permute(0, 3, 1, 2)                                         # (1, hidden, ·, ·)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2).to(table.dtype)                  # (1, h·w, hidden)
        return torch.cat([table[:, :1], grid], dim=1)


class LayerScale(nn.Module):
    """x * λ, one learned λ per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class DINOLayer(CLIPLayer):
    """x + λ1 * attention(norm(x)), then x + λ2 * mlp(norm(x))."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__(config)
        self.layer_scale1 = LayerScale(config.hidden_size)
        self.layer_scale2 = LayerScale(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x), is_causal=False))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class DINOv2(nn.Module):
    """Images (B, 3, H, W) -> feature maps (B, hidden, h, w), one for each layer of out_indices."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        layers = nn.ModuleList(DINOLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> list[Tensor]:
        grid = [side // self.config.patch_size for side in images.shape[-2:]]   # h, w in patches
        maps = []
        x = self.embeddings(images)                                             # (B, 1+N, hidden)
        for i, layer in enumerate(self.encoder["layers"], start=1):
            x = layer(x)                                                        # (B, 1+N, hidden)
            if i in self.config.out_indices:
                # Note: every map goes through the same final norm; the class token is left out.
                patches = self.layernorm(x)[:, 1:]                              # (B, N, hidden)
                maps.append(patches.transpose(1, 2).unflatten(2, grid))         # (B, hidden, h, w)
        return maps


def reassemble(width: int, channels: int, level: int) -> nn.Sequential:
    """A feature map (B, width, h, w) -> (B, channels, ·, ·), resized by the level's factor.

    level: 0 for 4 times the resolution, 1 for twice, 2 for the same, 3 for half."""
    if level == 0:
        resize = nn.ConvTranspose2d(channels, channels, 4, stride=4)
    elif level == 1:
        resize = nn.ConvTranspose2d(channels, channels, 2, stride=2)
    elif level == 2:
        resize = nn.Identity()
    else:
        resize = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    projection = nn.Conv2d(width, channels, 1)
    return nn.Sequential(OrderedDict(projection=projection, resize=resize))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))): (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(width, width, 3, padding=1)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a level to the sum of the coarser levels, and resizes the result.

    coarser: the sum so far (B, C, h, w); None for the coarsest level.
    level: the map to add (B, C, h, w).
    size: height and width of the result."""

    def __init__(self, width: int):
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.residual_layer1 = ResidualUnit(width)
        self.residual_layer2 = ResidualUnit(width)

    def forward(self, coarser: Tensor | None, level: Tensor, size: tuple[int, int]) -> Tensor:
        if coarser is None:
            # Note: the weights of the coarsest level's residual_layer1 are never used.
            x = level
        else:
            x = coarser + self.residual_layer1(level)
        x = self.residual_layer2(x)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)    # (B, C, *size)
        return self.projection(x)


class DPTNeck(nn.Module):
    """Four feature maps (B, hidden, h, w) -> one (B, fusion, 8h, 8w)."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__()
        sizes, width = config.neck_hidden_sizes, config.fusion_hidden_size
        stages = nn.ModuleList(
            reassemble(config.hidden_size, channels, level) for level, channels in enumerate(sizes))
        self.reassemble_stage = nn.ModuleDict({"layers": stages})
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, 3, padding=1, bias=False) for channels in sizes)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(Fusion(width) for _ in sizes)})

    def forward(self, maps: list[Tensor]) -> Tensor:
        stages = zip(self.convs, self.reassemble_stage["layers"], maps)
        levels = [conv(layer(x)) for conv, layer, x in stages]
        h, w = levels[0].shape[-2:]
        # Each sum is resized to the next finer level, the last one to twice the finest.
        sizes = [(2 * h, 2 * w), *(level.shape[-2:] for level in levels)]
        x = None
        for i, fusion in enumerate(self.fusion_stage["layers"], start=1):
            x = fusion(x, levels[-i], sizes[-1 - i])
        return x


class DepthHead(nn.Module):
    """A feature map (B, fusion, ·, ·) -> depth (B, H, W), never negative."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__()
        self.config = config
        width = config.fusion_hidden_size
        self.conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, config.head_hidden_size, 3, padding=1)
        self.conv3 = nn.Conv2d(config.head_hidden_size, 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(self.conv1(x), size=size, mode="bilinear", align_corners=True)
        x = self.conv3(F.relu(self.conv2(x)))[:, 0]                             # (B, H, W)
        x = x.sigmoid() if self.config.metric else F.relu(x)
        return x * self.config.max_depth


class DepthAnything(nn.Module):
    """Images (B, 3, H, W) -> inverse depth, or distance in metres: (B, H', W').

    H' and W' are H and W rounded down to whole patches."""

    def __init__(self, config: DepthAnythingConfig = DepthAnythingConfig()):
        super().__init__()
        self.config = config
        self.backbone = DINOv2(config)
        self.neck = DPTNeck(config)
        self.head = DepthHead(config)

    def forward(self, images: Tensor) -> Tensor:
        patch = self.config.patch_size
        size = tuple(side // patch * patch for side in images.shape[-2:])
        return self.head(self.neck(self.backbone(images)), size)                # (B, H', W')
