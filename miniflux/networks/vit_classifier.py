"""A vision transformer that sorts pictures: a picture -> one score for each of its labels.

The picture's patches and a class token go through CLIP's layers; a linear layer reads the class token (Dosovitskiy et al. 2020,
arXiv:2010.11929). The original repository's filter is one: `Falconsai/nsfw_image_detection`, with the labels normal and nsfw.

Attributes are named like the tensors of that checkpoint, those within a transformer layer like CLIP's. Reference: transformers'
`ViTForImageClassification`.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .clip import CLIPEncoder
from .depth_anything import PatchEmbeddings


@dataclass(frozen=True)
class ViTConfig:
    """Sizes; the defaults are ViT-B/16's (85,800,194 parameters with two labels)."""

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
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layernorm(self.encoder(self.embeddings(pictures), is_causal=False))


class ViTClassifier(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1], S = image_size -> logits (B, labels)."""

    def __init__(self, config: ViTConfig = ViTConfig()):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.classifier(self.vit(pictures)[:, 0])                        # (B, labels)
