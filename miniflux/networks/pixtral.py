"""Pixtral: an image and a question -> the logits of the answer's first token.

    image    vision tower: a transformer over 16x16 patches, whose rows and columns enter by RoPE
             projector: patch vectors -> the tokens that replace [IMG] in the text
    text     decoder: Mistral's causal transformer with grouped-query attention

Agrawal et al. 2024, arXiv:2410.07073. Both transformers have the same layers: RMS norms, rotary
positions, a gated MLP, no biases. One forward pass is enough to see whether "yes" or "no" is the
more likely answer, so there is no key-value cache and no generation loop.

Attributes are named like the tensors of `mistral-community/pixtral-12b`; in the layers of the
vision tower, like the decoder's. Reference: transformers' `LlavaForConditionalGeneration` with
`PixtralVisionModel` and `MistralModel`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import apply_rope, rope_table
from .t5 import T5LayerNorm as RMSNorm

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one of the two transformers; the defaults are those of Pixtral's decoder."""

    hidden_size: int = 5120
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8       # each serves a group of query heads
    head_dim: int = 128                # Note: not hidden_size / num_attention_heads, which is 160.
    rope_theta: float = 1e9
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"


@dataclass(frozen=True)
class PixtralConfig:
    """Sizes of both transformers; the defaults are Pixtral 12B's (12,682,739,712 parameters)."""

    text: TransformerConfig = TransformerConfig()
    vision: TransformerConfig = TransformerConfig(1024, 4096, 24, 16, 16, 64, 1e4)
    patch_size: int = 16
    vocab_size: int = 131_072
    image_token: int = 10              # id of [IMG]


def interleave_halves(x: Tensor) -> Tensor:
    """Reorders channels so that i and i + D/2 are neighbours: [a, b, c, d] -> [a, c, b, d].

    These models rotate channels i and i + D/2 as a pair; `apply_rope` rotates neighbours. Queries
    and keys are reordered alike, which leaves their products unchanged."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: (B, S, hidden) -> (B, S, hidden)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)             # (B, ·, S, D)

    def forward(self, x: Tensor, pe: Tensor, is_causal: bool) -> Tensor:
        q = self.split_heads(self.q_proj(x))                                    # (B, H, S, D)
        k = self.split_heads(self.k_proj(x))                                    # fewer heads
        v = self.split_heads(self.v_proj(x))
        q = apply_rope(interleave_halves(q), pe)
        k = apply_rope(interleave_halves(k), pe)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))                        # (B, S, hidden)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))"""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, pe: Tensor, is_causal: bool) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), pe, is_causal)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionTower(nn.Module):
    """Images (B, 3, H, W), normalised as for CLIP -> patch tokens, row by row: (B, N, hidden)."""

    def __init__(self, config: TransformerConfig, patch_size: int):
        super().__init__()
        self.config = config
        self.patch_conv = nn.Conv2d(
            3, config.hidden_size, patch_size, stride=patch_size, bias=False)
        self.ln_pre = RMSNorm(config.hidden_size, config.rms_norm_eps)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"layers": layers})

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_conv(images)                                           # (B, hidden, h, w)
        pe = self.positions(*x.shape[-2:], x.device)
        x = self.ln_pre(x.flatten(2).transpose(1, 2))                           # (B, N, hidden)
        for layer in self.transformer["layers"]:
            x = layer(x, pe, is_causal=False)
        return x

    def positions(self, h: int, w: int, device: torch.device) -> Tensor:
        """The RoPE table of h x w patches: (N, D/2, 2, 2)."""
        # Note: rows have the even frequencies of a whole head, columns the odd ones; each odd
        # frequency is the even one before it times theta^(-2/D).
        dim, theta = self.config.head_dim, self.config.rope_theta
        row = torch.arange(h, device=device)
        column = torch.arange(w, device=device)
        rows, columns = torch.meshgrid(row, column, indexing="ij")
        columns = columns.flatten() * theta ** (-2 / dim)
        ids = torch.stack([rows.flatten(), columns], dim=-1)                    # (N, 2)
        return rope_table(ids, (dim // 2, dim // 2), theta)


class Projector(nn.Module):
    """Patch tokens (B, N, vision width) -> (B, N, text width)."""

    def __init__(self, config: PixtralConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Decoder(nn.Module):
    """Embedded tokens (B, S, hidden) -> the output at the last token (B, hidden)."""

    def __init__(self, config: TransformerConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1], device=x.device)[:, None]                # (S, 1)
        pe = rope_table(ids, (self.config.head_dim,), self.config.rope_theta)   # (S, D/2, 2, 2)
        for layer in self.layers:
            x = layer(x, pe, is_causal=True)
        return self.norm(x[:, -1])                                              # (B, hidden)


class Pixtral(nn.Module):
    """Token ids (B, S) and images (B, 3, H, W) for their [IMG] tokens -> logits (B, vocab).

    The logits are those of the token that follows the text."""

    def __init__(self, config: PixtralConfig = PixtralConfig()):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.patch_size)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text, config.vocab_size)
        self.lm_head = nn.Linear(config.text.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, images: Tensor | None = None) -> Tensor:
        x = self.language_model.embed_tokens(ids)                               # (B, S, hidden)
        if images is not None:
            patches = self.multi_modal_projector(self.vision_tower(images))     # (B, N, hidden)
            is_image = ids == self.config.image_token                           # (B, S)
            tokens, count = int(is_image.sum()), patches.shape[0] * patches.shape[1]
            if tokens != count:
                raise ValueError(f"there are {tokens} [IMG] tokens for {count} patches: expected "
                                 "one token for each patch")
            x = x.masked_scatter(is_image[..., None], patches)
        return self.lm_head(self.language_model(x))                             # (B, vocab)
