"""Depth Anything: a picture -> how near each of its pixels is (Yang et al. 2024, arXiv:2401.10891; V2: arXiv:2406.09414).

    backbone    DINOv2, a vision transformer (Oquab et al. 2023, arXiv:2304.07193): patches -> four maps of features
    neck        DPT (Ranftl et al. 2021, arXiv:2103.13413): the maps at 4, 2, 1 and 1/2 times the patches' resolution, fused
                from the coarsest to the finest
    head        convolutions to one number a pixel

A *relative* model tells nearness (larger is nearer, in no unit), a *metric* one the distance in metres. The transformer's layers
are CLIP's, with a learned scale on what each adds.

Attributes are named like the tensors of `LiheYoung/depth-anything-large-hf`, those within a transformer layer like CLIP's.
Reference: transformers' `DepthAnythingForDepthEstimation`.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIPLayer


@dataclass(frozen=True)
class DepthAnythingConfig:
    """Sizes; the defaults are those of the large model (335,315,649 parameters with an unused mask token)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 518                                   # whose grid of patches has a learned position each
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    out_indices: tuple[int, ...] = (21, 22, 23, 24)         # the layers, from 1, whose outputs the neck reads; V2: 5, 12, 18, 24
    neck_hidden_sizes: tuple[int, ...] = (256, 512, 1024, 1024)
    fusion_hidden_size: int = 256
    head_hidden_size: int = 32
    metric: bool = False                                    # distance instead of nearness
    max_depth: float = 1.0                                  # what the last activation is multiplied by


class PatchEmbeddings(nn.Module):
    """(B, 3, H, W) -> a class token and one vector a patch, each with that of its place: (B, 1 + N, hidden)."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + (config.image_size // patch) ** 2, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, stride=patch)})

    def forward(self, pictures: Tensor) -> Tensor:
        # Note: the convolution drops the rows and columns that are left over.
        x = self.patch_embeddings["projection"](pictures)                       # (B, hidden, h, w)
        positions = self.positions(*x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return x + positions

    def positions(self, h: int, w: int) -> Tensor:
        """The table (1, 1 + h·w, hidden), stretched from its own square grid to h x w patches."""
        table = self.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        if (h, w) == (side, side):
            return table
        # Note: in float32, as half precision shifts the positions.
        grid = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class DINOLayer(CLIPLayer):
    """x + λ1 · attention(norm(x)), then x + λ2 · MLP(norm(x))."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__(config)
        self.layer_scale1 = LayerScale(config.hidden_size)
        self.layer_scale2 = LayerScale(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x), is_causal=False))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class DINOv2(nn.Module):
    """(B, 3, H, W) -> the features after each layer of out_indices, normalised: maps (B, hidden, h, w)."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(DINOLayer(config) for _ in range(config.num_hidden_layers))})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, maps = self.embeddings(pictures), []
        grid = [side // self.config.patch_size for side in pictures.shape[-2:]]
        for i, layer in enumerate(self.encoder["layers"], start=1):
            x = layer(x)                                                        # (B, 1 + N, hidden)
            if i in self.config.out_indices:
                # Note: every map goes through the one final norm, and the class token is left out.
                maps.append(self.layernorm(x)[:, 1:].transpose(1, 2).unflatten(2, grid))  # (B, hidden, h, w)
        return maps


def reassemble(width: int, channels: int, level: int) -> nn.Sequential:
    """A map of the backbone -> (B, channels, ·, ·) at 4, 2, 1 or 1/2 times its resolution."""
    resize = (lambda: nn.ConvTranspose2d(channels, channels, 4, stride=4), lambda: nn.ConvTranspose2d(channels, channels, 2, stride=2),
              nn.Identity, lambda: nn.Conv2d(channels, channels, 3, stride=2, padding=1))[level]
    return nn.Sequential(OrderedDict(projection=nn.Conv2d(width, channels, 1), resize=resize()))


class ResidualUnit(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(width, width, 3, padding=1)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fusion(nn.Module):
    """What came from the coarser levels, plus a level, enlarged to `size`."""

    def __init__(self, width: int):
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.residual_layer1 = ResidualUnit(width)
        self.residual_layer2 = ResidualUnit(width)

    def forward(self, coarser: Tensor | None, level: Tensor, size: tuple[int, int]) -> Tensor:
        # Note: the coarsest level is taken as it is; the weights of its residual_layer1 are never used.
        x = self.residual_layer2(level if coarser is None else coarser + self.residual_layer1(level))
        return self.projection(F.interpolate(x, size=size, mode="bilinear", align_corners=True))


class DPTNeck(nn.Module):
    """Four maps (B, hidden, h, w) -> one (B, fusion, 8h, 8w)."""

    def __init__(self, config: DepthAnythingConfig):
        super().__init__()
        sizes, width = config.neck_hidden_sizes, config.fusion_hidden_size
        self.reassemble_stage = nn.ModuleDict({"layers": nn.ModuleList(
            reassemble(config.hidden_size, channels, level) for level, channels in enumerate(sizes))})
        self.convs = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1, bias=False) for channels in sizes)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(Fusion(width) for _ in sizes)})

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = [conv(layer(x)) for conv, layer, x in zip(self.convs, self.reassemble_stage["layers"], maps)]
        h, w = levels[0].shape[-2:]
        sizes = [(2 * h, 2 * w), *(level.shape[-2:] for level in levels)]       # the finest is enlarged twice
        x = None
        for i, fusion in enumerate(self.fusion_stage["layers"], start=1):
            x = fusion(x, levels[-i], sizes[-1 - i])
        return x


class DepthHead(nn.Module):
    """(B, fusion, ·, ·) -> (B, H, W), which is not negative."""

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
        return (x.sigmoid() if self.config.metric else F.relu(x)) * self.config.max_depth


class DepthAnything(nn.Module):
    """Pictures (B, 3, H, W) -> (B, H', W'), nearness or distance; H' and W' are H and W rounded down to whole patches."""

    def __init__(self, config: DepthAnythingConfig = DepthAnythingConfig()):
        super().__init__()
        self.config = config
        self.backbone = DINOv2(config)
        self.neck = DPTNeck(config)
        self.head = DepthHead(config)

    def forward(self, pictures: Tensor) -> Tensor:
        patch = self.config.patch_size
        size = tuple(side // patch * patch for side in pictures.shape[-2:])
        return self.head(self.neck(self.backbone(pictures)), size)              # (B, H', W')
