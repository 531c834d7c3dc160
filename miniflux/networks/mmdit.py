"""The FLUX.1 transformer: a multimodal diffusion transformer (MMDiT) that predicts a velocity.

    v = MMDiT(img, txt, vec, t, guidance)        so that        dx/dt = v        carries noise (t = 1) to data (t = 0)

Text tokens and image tokens first run through double blocks, where each stream has weights of its own and the two meet
in one attention; then through single blocks, where they are one sequence. The time, the guidance and the pooled prompt
act through one vector `vec`, which scales, shifts and gates every block (adaLN, Peebles & Xie 2022).

Glossary, used in the whole package:
    B  batch              img  image tokens (B, N, ·)       t    time in [0, 1]: 1 is noise, 0 is data
    L  text tokens        txt  text tokens (B, L, ·)        x    the state: a picture's latents on their way
    N  image tokens       vec  conditioning (B, hidden)     v    velocity dx/dt = noise - data
    H  heads              pe   RoPE table of txt, img       z    latent image (B, 16, h, w)
    D  head width

Attributes are named like the tensors of `flux1-dev.safetensors`, so a checkpoint loads without renaming.
Papers: Esser et al. 2024 (arXiv:2403.03206, the MMDiT); reference: `src/flux/model.py`, `src/flux/modules/layers.py`
of the original repository.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention, head_norm, look, rope_table
from .layers import Linear, TanhGELU, modulate, tanh_gelu


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the transformer. The defaults are FLUX.1-dev; a variant is one line of difference."""

    in_channels: int = 64                  # 16 latent channels x 2x2 patch; 128 and 384 with control or fill channels
    out_channels: int = 64
    vec_in_dim: int = 768                  # width of CLIP's pooled vector
    context_in_dim: int = 4096             # width of T5's tokens
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19                        # double blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head turned by (reference index, row, column)
    theta: float = 10000.0
    guidance_embed: bool = True            # false for schnell

    def __post_init__(self):
        head_dim, rest = divmod(self.hidden_size, self.num_heads)
        axes = self.axes_dim
        if rest or sum(axes) != head_dim or len(axes) != 3 or any(dim % 2 for dim in axes):
            raise ValueError(f"the RoPE axes are {axes}: expected three even numbers that sum to the head width, "
                             f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads}")


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of 1000·t, cosines first: t (B,) -> (B, dim) in t's dtype. Also used for the guidance."""
    # Note: in bfloat16 the product 1000·t is rounded to bfloat16, as in the original (t = 0.9045 becomes 908).
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angle = (1000 * t)[:, None].float() * freqs                                 # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype)            # (B, dim)


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Pattern "B S (3 H D) -> B S 3 H D": the rows of a fused projection are q, then k, then v, each head by head."""
    return qkv.unflatten(-1, (3, num_heads, -1))


def clamp_fp16(x: Tensor) -> Tensor:
    """Keeps float16 finite (its largest number is 65504); other dtypes pass untouched."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class MLPEmbedder(nn.Module):
    """A vector of any width -> (B, hidden): linear, SiLU, linear."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))                         # (B, hidden)


class RMSNorm(nn.Module):
    """Holds the learnt scale of x / rms(x) · scale; `attention` computes it for queries and keys at once."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    """The scales of RMSNorm for queries and keys, head by head: keeps the attention scores in range."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def scales(self) -> Tensor:
        return torch.stack([self.query_norm.scale, self.key_norm.scale])        # (2, D)


class SelfAttention(nn.Module):
    """The projections of one stream's attention; the attention itself is shared by both streams."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)

    def project(self, x: Tensor) -> Tensor:
        return split_heads(self.qkv(x), self.num_heads)                         # (B, S, 3, H, D)


class Modulation(nn.Module):
    """vec -> `count` vectors (B, 1, hidden): shift, scale and gate of each sub-layer, in this order."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.count = count
        self.lin = Linear(hidden_size, count * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)         # count x (B, 1, hidden)


def mlp(hidden_size: int, mlp_dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(hidden_size, mlp_dim), TanhGELU(), Linear(mlp_dim, hidden_size))


KeysValues = Sequence[tuple[Tensor, Tensor]]  # pairs (B or 1, H, T, D): tokens that a double block's image looks at besides


class DoubleBlock(nn.Module):
    """Two streams with their own weights, one attention over both."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.img_mod = Modulation(hidden_size, 6)
        self.img_attn = SelfAttention(hidden_size, num_heads)
        self.img_mlp = mlp(hidden_size, mlp_dim)
        self.txt_mod = Modulation(hidden_size, 6)
        self.txt_attn = SelfAttention(hidden_size, num_heads)
        self.txt_mlp = mlp(hidden_size, mlp_dim)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, kv: KeysValues = ()) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_qkv = self.img_attn.project(modulate(img, img_shift1, img_scale1))  # (B, N, 3, H, D)
        txt_qkv = self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1))  # (B, L, 3, H, D)
        # Note: text tokens come before image tokens.
        attn = attention(torch.cat([txt_qkv, img_qkv], dim=1), pe, self.img_attn.norm.scales(), self.txt_attn.norm.scales(),
                         L=txt.shape[1])                                        # (B, L+N, hidden)
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attn))       # (B, N, hidden)
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        for keys, values in kv:
            # Note: the image's queries before their rotation; the result is neither projected nor gated.
            queries = head_norm(img_qkv[:, :, 0].transpose(1, 2), self.img_attn.norm.query_norm.scale)  # (B, H, N, D)
            img = img + look(queries, keys, values)                             # (B, N, hidden)
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attn))       # (B, L, hidden)
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return clamp_fp16(img), clamp_fp16(txt)


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side, their products fused in two linears."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = Linear(hidden_size, 3 * hidden_size + mlp_dim)           # rows q, k, v, mlp
        self.linear2 = Linear(hidden_size + mlp_dim, hidden_size)               # columns attention, mlp
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        sizes = 3 * x.shape[-1], self.linear2.in_features - x.shape[-1]
        qkv, mlp_in = self.linear1(modulate(x, shift, scale)).split(sizes, dim=-1)
        attn = attention(split_heads(qkv, self.num_heads), pe, self.norm.scales())  # (B, L+N, hidden)
        y = self.linear2(torch.cat([attn, tanh_gelu(mlp_in)], dim=-1))
        return clamp_fp16(torch.addcmul(x, gate, y))                            # (B, L+N, hidden)


class FinalLayer(nn.Module):
    """The last modulation and the projection back to patches."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        # Note: rows are shift then scale here, scale then shift in the diffusers layout.
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(img, shift, scale))                         # (B, N, out_channels)


class MMDiT(nn.Module):
    """The whole transformer; `forward` gives the velocity of the image tokens."""

    def __init__(self, config: MMDiTConfig = MMDiTConfig()):
        super().__init__()
        self.config = config
        hidden, heads, mlp_dim = config.hidden_size, config.num_heads, round(config.hidden_size * config.mlp_ratio)
        self.img_in = Linear(config.in_channels, hidden)
        self.txt_in = Linear(config.context_in_dim, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden, heads, mlp_dim) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden, heads, mlp_dim) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(hidden, config.out_channels)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, guidance: Tensor | None,
                img_ids: Tensor, txt_ids: Tensor, residuals: Sequence[Tensor | None] | None = None,
                image_kv: Sequence[KeysValues] | None = None) -> Tensor:
        """img (B, N, in_channels), txt (B, L, context_in_dim), vec (B, vec_in_dim), t (B,) in [0, 1],
        guidance (B,) or None where `guidance_embed` is false, img_ids (N, 3), txt_ids (L, 3) integers
        -> velocity (B, N, out_channels).

        residuals: what is added to the image tokens after each block, the double ones first: (B, N, hidden) or None. image_kv:
        for each double block, keys and values that its image tokens look at too."""
        pe = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim, self.config.theta)
        vec = self.conditioning(vec, t, guidance)                               # (B, hidden)
        img, txt = self.img_in(img), self.txt_in(txt)                           # (B, N, hidden), (B, L, hidden)
        residuals = residuals or [None] * (len(self.double_blocks) + len(self.single_blocks))
        for block, residual, kv in zip(self.double_blocks, residuals, image_kv or repeat(())):
            img, txt = block(img, txt, vec, pe, kv)
            img = img if residual is None else img + residual
        x = torch.cat([txt, img], dim=1)                                        # (B, L+N, hidden)
        for block, residual in zip(self.single_blocks, residuals[len(self.double_blocks):]):
            x = block(x, vec, pe)
            x = x if residual is None else x + F.pad(residual, (0, 0, txt.shape[1], 0))  # zeros for the text
        return self.final_layer(x[:, txt.shape[1]:], vec)                       # (B, N, out_channels)

    def conditioning(self, vec: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """Time, guidance and pooled prompt as one vector (B, hidden)."""
        if self.config.guidance_embed != (guidance is not None):
            raise ValueError("this transformer " + ("needs a guidance value" if guidance is None
                             else "has no guidance embedding: pass guidance=None"))
        out = self.time_in(timestep_embedding(t))
        if guidance is not None:
            out = out + self.guidance_in(timestep_embedding(guidance))
        return out + self.vector_in(vec)
