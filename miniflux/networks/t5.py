"""The T5 encoder: a prompt -> one vector per token.

A bidirectional transformer without position embeddings. Instead, a learned bias is added to the
attention scores; it depends on the distance between two tokens, in logarithmic buckets (Raffel et
al. 2019, arXiv:1910.10683; version 1.1, with a gated GELU). Its output is the MMDiT's text stream.

Attributes are named like the tensors of `google/t5-v1_1-xxl`. Reference: transformers'
`T5EncoderModel`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the defaults are T5 v1.1 XXL's (4,762,310,656 parameters)."""

    d_model: int = 4096                # width of a token
    d_kv: int = 64                     # width of a head
    d_ff: int = 10240                  # width inside the MLP
    num_layers: int = 24
    num_heads: int = 64
    vocab_size: int = 32128
    num_buckets: int = 32              # of distances, for the bias of the attention scores
    max_distance: int = 128            # from here on, all distances share a bucket


def relative_position_bucket(distance: Tensor, num_buckets: int = 32,
                             max_distance: int = 128) -> Tensor:
    """The bucket of each distance (key's position - query's position), of any shape.

    The second half of the buckets is for keys to the right of the query. In each half, the first
    half of the buckets holds one distance each; the others grow logarithmically to max_distance.

    >>> relative_position_bucket(torch.tensor([-200, -9, -1, 0, 1, 8, 64])).tolist()
    [15, 8, 1, 0, 17, 24, 30]
    """
    half = num_buckets // 2
    exact = half // 2
    n = distance.abs()
    # Note: float32, and in this order of operations; otherwise exact powers of two fall into the
    # neighbouring bucket.
    log = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    log = log * (half - exact)
    far = (exact + log.long()).clamp(max=half - 1)
    return half * (distance > 0) + torch.where(n < exact, n, far)


def clamp_fp16(x: Tensor) -> Tensor:
    """Clamps T5's outliers, which overflow float16; more tightly if one is infinite already."""
    if x.dtype != torch.float16:
        return x
    limit = torch.where(x.isinf().any(), 64504.0, 65504.0)
    return x.clamp(-limit, limit)


class T5LayerNorm(nn.Module):
    """x / rms(x) · weight: no mean, no bias."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Note: rounded to the weight's dtype before the product with the weight.
        x = x * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class T5Attention(nn.Module):
    """Attention without 1/√D and with an additive bias (1, H, S, S)."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.num_heads = config.num_heads
        self.buckets = (config.num_buckets, config.max_distance)
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)

    def compute_bias(self, length: int) -> Tensor:
        position = torch.arange(length, device=self.relative_attention_bias.weight.device)
        distance = position[None, :] - position[:, None]                        # key - query (S, S)
        bucket = relative_position_bucket(distance, *self.buckets)              # (S, S)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]      # (1, H, S, S)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)            # (B, H, S, D)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(x))
        v = self.split_heads(self.v(x))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, S, D)
        return self.o(x.transpose(1, 2).flatten(2))                             # (B, S, d_model)


class T5FF(nn.Module):
    """wo(gelu(wi_0(x)) * wi_1(x))"""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.wi_0(x), approximate="tanh")                         # (B, S, d_ff)
        up = self.wi_1(x)                                                       # (B, S, d_ff)
        if x.dtype != torch.float16:
            return self.wo(gate * up)                                           # (B, S, d_model)
        # Note: the product overflows float16, and sums of infinities may be NaN. So it is computed
        # in float32; each token is scaled down for wo, and its result is scaled up again.
        product = gate.float() * up.float()                                     # (B, S, d_ff)
        scale = (product.abs().amax(dim=-1, keepdim=True) / 1024).clamp(min=1)  # (B, S, 1)
        y = self.wo((product / scale).to(x.dtype))                              # (B, S, d_model)
        return (y.float() * scale).to(x.dtype)


class T5LayerSelfAttention(nn.Module):
    """x + attention(norm(x))"""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_relative_attention_bias)
        self.layer_norm = T5LayerNorm(config.d_model)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return clamp_fp16(x + self.SelfAttention(self.layer_norm(x), bias))


class T5LayerFF(nn.Module):
    """x + mlp(norm(x))"""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5FF(config)
        self.layer_norm = T5LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return clamp_fp16(x + self.DenseReluDense(self.layer_norm(x)))


class T5Block(nn.Module):
    """Attention, then MLP: (B, S, d_model) -> (B, S, d_model)."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        attention = T5LayerSelfAttention(config, has_relative_attention_bias)
        self.layer = nn.ModuleList([attention, T5LayerFF(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class T5Stack(nn.Module):
    """All blocks and the last norm: (B, S, d_model) -> (B, S, d_model)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(
            T5Block(config, has_relative_attention_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        # Note: only the first block has a table; all blocks add the same bias.
        bias = self.block[0].layer[0].SelfAttention.compute_bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5(nn.Module):
    """Token ids (B, S) -> (B, S, d_model)."""

    def __init__(self, config: T5Config = T5Config()):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        # Note: no mask: FLUX attends to padding, and a mask would change its images.
        return self.encoder(self.shared(ids))                                   # (B, S, d_model)
