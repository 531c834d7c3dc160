"""CLIP: a prompt -> one vector, an image -> one vector (Radford et al. 2021, arXiv:2103.00020).

The text tower, a small causal transformer, reads up to 77 byte-pair tokens; its state at the
end-of-text token is the prompt's pooled vector, which FLUX adds to the time embedding. The vision
tower, without a mask, reads an image's patches behind one class token; its state there is the
image's vector, which IP-Adapters turn into tokens.

Attributes are named like the tensors of `openai/clip-vit-large-patch14`. Reference: transformers'
`CLIPTextModel` and `CLIPVisionModelWithProjection`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the text tower; the defaults are CLIP ViT-L/14's (123,060,480 parameters)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    # The token at which the prompt is pooled; 2 means the largest id (see `CLIPText.end`).
    eos_token_id: int = field(default=2, metadata={"least": 0})


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the approximation CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# By transformers' names.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": tanh_gelu,
               "gelu_new": tanh_gelu}


class CLIPAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)     # (B, H, S, D)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))                      # (B, S, width)


class CLIPMLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    config: any with these sizes; SigLIP has the same layers."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), is_causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, is_causal)
        return x


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight[:ids.shape[1]]               # (S, hidden)
        return self.token_embedding(ids) + positions                            # (B, S, hidden)


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids), is_causal=True))


class CLIPText(nn.Module):
    """Token ids (B, S) -> the pooled vector (B, hidden)."""

    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.text_model(ids)                                                # (B, S, hidden)
        # No padding mask: what follows the end cannot act on it (causal).
        return x[torch.arange(len(ids), device=ids.device), self.end(ids)]      # (B, hidden)

    def end(self, ids: Tensor) -> Tensor:
        """The position of the first end-of-text token of each prompt: (B, S) -> (B,).

        Note: 2 is a leftover in the official config; it means the largest id, which end-of-text is
        in the official vocabulary. After words were added to it, the config must name the token."""
        end = self.config.eos_token_id
        scores = ids if end == 2 else (ids == end).int()
        return scores.argmax(dim=-1)                                            # first of equals


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the vision tower; the defaults are CLIP ViT-L/14's (303,966,208 parameters)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 768
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"


class CLIPVisionEmbeddings(nn.Module):
    """Images (B, 3, S, S) -> the class token, then one token a patch: (B, 1+N, hidden)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        size, patches = config.patch_size, (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, size, stride=size, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)     # (B, N, hidden)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return x + self.position_embedding.weight                               # (B, 1+N, hidden)


class CLIPVisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        # Sic: the checkpoint's spelling.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)), is_causal=False)
        return self.post_layernorm(x[:, 0])                                     # (B, hidden)


class CLIPVision(nn.Module):
    """Images (B, 3, S, S), normalised, S = image_size -> their vectors (B, projection_dim), not of
    unit length."""

    def __init__(self, config: CLIPVisionConfig = CLIPVisionConfig()):
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(images))           # (B, projection_dim)
