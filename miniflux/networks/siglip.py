"""SigLIP's vision tower, and Redux's embedder on top of it: an image -> text tokens.

    tokens = redux_down(silu(redux_up(SigLIP(image))))

The image is cut into patches, which go through a transformer without a mask (Zhai et al. 2023,
arXiv:2303.15343); the embedder maps the results to the width of T5's tokens. The layers are
CLIP's, with another activation.

Attributes are named like the tensors of `google/siglip-so400m-patch14-384` and of
`flux1-redux-dev.safetensors`. Reference: transformers' `SiglipVisionModel`;
`src/flux/modules/image_embedders.py` of the original repository.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIPEncoder


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the vision tower; the defaults are so400m-patch14-384's.

    They make 413 million parameters, without its pooling head, which is not used here."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def num_patches(self) -> int:
        # Note: 384 is not a multiple of 14: the last six rows and columns are dropped.
        return (self.image_size // self.patch_size) ** 2


class SigLIPEmbeddings(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> for each patch its vector plus that of its position."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.num_patches, width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)           # (B, N, hidden)
        return x + self.position_embedding.weight                               # (B, N, hidden)


class SigLIPTransformer(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> patch tokens (B, N, hidden)."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.embeddings = SigLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)                                             # (B, N, hidden)
        return self.post_layernorm(self.encoder(x, is_causal=False))


class SigLIP(nn.Module):
    """Images (B, 3, S, S) in [-1, 1], S = image_size -> patch tokens (B, N, hidden)."""

    def __init__(self, config: SigLIPConfig = SigLIPConfig()):
        super().__init__()
        self.config = config
        self.vision_model = SigLIPTransformer(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.vision_model(images)                                      # (B, N, hidden)


@dataclass(frozen=True)
class ReduxConfig:
    """Sizes of Redux's embedder; the defaults are the official one's (64,503,808 parameters)."""

    redux_dim: int = 1152              # width of SigLIP's tokens
    txt_in_features: int = 4096        # width of T5's tokens


class ReduxEmbedder(nn.Module):
    """SigLIP's tokens (B, N, redux_dim) -> text tokens (B, N, txt_in_features)."""

    def __init__(self, config: ReduxConfig = ReduxConfig()):
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.redux_dim, 3 * config.txt_in_features)
        self.redux_down = nn.Linear(3 * config.txt_in_features, config.txt_in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.redux_down(F.silu(self.redux_up(x)))                        # (B, N, txt_in)
