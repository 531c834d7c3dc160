"""Pixtral: a picture and a question -> the logits of the answer's first token.

    picture  -> vision tower: a transformer over 16x16 patches of any number and shape, told their rows and columns by RoPE
             -> projector    -> tokens in the place of the text's [IMG]
    text     -> decoder: Mistral's, causal, several query heads to one head of keys and values (Agrawal et al. 2024, arXiv:2410.07073)

Both transformers are the same here: RMS norms, rotary positions, a gated MLP, no biases. One forward pass is enough to see whether
"yes" or "no" is the likelier answer, so there is no cache and no loop.

Attributes are named like the tensors of `mistral-community/pixtral-12b`, those of the vision tower's layers like the decoder's.
Reference: transformers' `LlavaForConditionalGeneration` with `PixtralVisionModel` and `MistralModel`.
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
    """Sizes of one of the two transformers; the defaults are the decoder's."""

    hidden_size: int = 5120
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128                # Note: not hidden_size / num_attention_heads, which would be 160.
    rope_theta: float = 1e9
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"


@dataclass(frozen=True)
class PixtralConfig:
    """The defaults are those of Pixtral 12B (12,682,739,712 parameters)."""

    text: TransformerConfig = TransformerConfig()
    vision: TransformerConfig = TransformerConfig(1024, 4096, 24, 16, 16, 64, 1e4)
    patch_size: int = 16
    vocab_size: int = 131_072
    image_token: int = 10              # [IMG]


def neighbours(x: Tensor) -> Tensor:
    """Channels i and i + D/2 of (..., D) side by side: a, b, c, d -> a, c, b, d. So these models pair what RoPE turns together;
    the scores do not see the order, as queries and keys share it."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        inner, shared = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, pe: Tensor, is_causal: bool) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, H or fewer, S, D)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(neighbours(q), pe), apply_rope(neighbours(k), pe)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))                        # (B, S, width)


class GatedMLP(nn.Module):
    """down(act(gate x) · up x)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
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
    """Pictures (B, 3, H, W), normalised like CLIP's -> one vector a patch, row by row: (B, N, hidden)."""

    def __init__(self, config: TransformerConfig, patch_size: int):
        super().__init__()
        self.config = config
        self.patch_conv = nn.Conv2d(3, config.hidden_size, patch_size, stride=patch_size, bias=False)
        self.ln_pre = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patch_conv(pictures)                                           # (B, hidden, h, w)
        pe = self.positions(*x.shape[-2:], x.device)
        x = self.ln_pre(x.flatten(2).transpose(1, 2))                           # (B, N, hidden)
        for layer in self.transformer["layers"]:
            x = layer(x, pe, is_causal=False)
        return x

    def positions(self, h: int, w: int, device: torch.device) -> Tensor:
        # Note: rows take the even frequencies of a whole head and columns the odd ones, theta^(-2/D) slower each.
        dim, theta = self.config.head_dim, self.config.rope_theta
        rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        ids = torch.stack([rows.flatten(), columns.flatten() * theta ** (-2 / dim)], dim=-1)   # (N, 2)
        return rope_table(ids, (dim // 2, dim // 2), theta)


class Projector(nn.Module):
    def __init__(self, config: PixtralConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Decoder(nn.Module):
    """Embedded tokens (B, S, hidden) -> the last one's vector (B, hidden), after all others were seen."""

    def __init__(self, config: TransformerConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        pe = rope_table(torch.arange(x.shape[1], device=x.device)[:, None], (self.config.head_dim,), self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, pe, is_causal=True)
        return self.norm(x[:, -1])


class Pixtral(nn.Module):
    """Token ids (B, S), pictures (B, 3, H, W) for their [IMG] tokens -> the logits of the token that follows: (B, vocab)."""

    def __init__(self, config: PixtralConfig = PixtralConfig()):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.patch_size)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text, config.vocab_size)
        self.lm_head = nn.Linear(config.text.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, pictures: Tensor | None = None) -> Tensor:
        x = self.language_model.embed_tokens(ids)                               # (B, S, hidden)
        if pictures is not None:
            seen = self.multi_modal_projector(self.vision_tower(pictures))      # (B, N, hidden)
            places = ids == self.config.image_token
            if int(places.sum()) != seen.shape[0] * seen.shape[1]:
                raise ValueError(f"{int(places.sum())} [IMG] tokens for {seen.shape[0] * seen.shape[1]} patches: expected one for each")
            x = x.masked_scatter(places[..., None], seen)
        return self.lm_head(self.language_model(x))                             # (B, vocab)
