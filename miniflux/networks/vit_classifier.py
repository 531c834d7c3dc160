"""A vision transformer that classifies images: an image -> one logit per label.

The image's patches and a class token go through transformer layers, which are CLIP's; a linear
layer maps the class token to the logits (Dosovitskiy et al. 2020, arXiv:2010.11929). The safety
filter of the original repository is one: `Falconsai/nsfw_image_detection`, with the labels normal
and nsfw.

Attributes are named like the tensors of that checkpoint; within a transformer layer, like CLIP's.
Reference: transformers' `ViTForImageClassification`.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .clip import CLIPEncoder
from .depth_anything import PatchEmbeddings


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the network; the defaults are ViT-B/16's (85,800,194 parameters, two labels)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    labels: tuple[str, ...] = ("normal", "nsfw")


class ViT(nn.Module):
    """Images (B, 3, S, S) -> the class token, then one token per patch: (B, 1 + N, hidden)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)                                             # (B, 1+N, hidden)
        return self.layernorm(self.encoder(x, is_causal=False))


class ViTClassifier(nn.Module):
    """Images (B, 3, S, S) in [-1, 1], S = image_size -> logits (B, labels)."""

    def __init__(self, config: ViTConfig = ViTConfig()):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.vit(images)[:, 0])                        # (B, labels)
