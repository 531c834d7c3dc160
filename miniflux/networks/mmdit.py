"""The FLUX.1 transformer: a multimodal diffusion transformer (MMDiT) that predicts a velocity.

    v = MMDiT(x, t, prompt, guidance)
    dx/dt = v       carries noise (t = 1) to data (t = 0)

Text tokens and image tokens first go through double blocks: each stream has its own weights, and
both meet in one attention. Then they are joined into one sequence and go through single blocks.
Time, guidance and the pooled prompt are summed into one vector `vec`. It shifts, scales and gates
every block (adaLN, Peebles & Xie 2022):

    double block      img = img + gate1 * proj(attention([norm1(txt), norm1(img)]))
                      img = img + gate2 * mlp(norm2(img))           and the same for txt
    single block      x   = x + gate * linear2([attention(norm(x)), mlp(norm(x))]),  x = [txt, img]
    every norm        norm(x) = (1 + scale) * LayerNorm(x) + shift

Glossary of the whole package:

    B   batch size                        img     image tokens (B, N, ·)
    L   number of text tokens             txt     text tokens (B, L, ·)
    N   number of image tokens            pooled  CLIP's vector of the prompt (B, vec_in_dim)
    S   length of a sequence: L + N       vec     conditioning: time + guidance + pooled (B, hidden)
    H   number of attention heads         pe      RoPE table of positions (S, D/2, 2, 2)
    D   width of a head                   ids     positions (index, row, column) of tokens (S, 3)

    t   time in [0, 1]: 1 is noise, 0 is data         z     latent image (B, 16, h, w)
    eps noise, of the same shape as z                 h, w  its height and width in latent pixels
    x   state: (1 - t) * z + t * eps                  v     velocity dx/dt = eps - z

Attributes are named like the tensors of `flux1-dev.safetensors`, so a checkpoint loads without
renaming. Paper: Esser et al. 2024 (arXiv:2403.03206, the MMDiT). Reference: `src/flux/model.py`
and `src/flux/modules/layers.py` of the original repository.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .attention import attention, cross_attention, rms_norm, rope_table
from .layers import Linear, TanhGELU, clamp_fp16, tanh_gelu


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the transformer; the defaults are FLUX.1-dev's (11,901,408,320 parameters)."""

    in_channels: int = 64              # 16 latent channels x 2x2 patch; control: 128, fill: 384
    out_channels: int = 64
    vec_in_dim: int = 768              # width of CLIP's pooled vector
    context_in_dim: int = 4096         # width of T5's tokens
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19                    # double blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head for index, row and column
    theta: float = 10000.0             # base of the RoPE frequencies
    guidance_embed: bool = True        # false for schnell

    def __post_init__(self):
        axes = self.axes_dim
        head_dim, rest = divmod(self.hidden_size, self.num_heads)
        if rest or sum(axes) != head_dim or len(axes) != 3 or any(dim % 2 for dim in axes):
            raise ValueError(
                f"the RoPE axes are {axes}: expected three even numbers that sum to the head "
                f"width, hidden_size / num_heads = {self.hidden_size} / {self.num_heads}")


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of 1000 * t, cosines first: t (B,) -> (B, dim), in t's dtype.

    The guidance is embedded by the same function."""
    # Note: in bfloat16 the product 1000 * t is rounded to bfloat16, as in the original repository
    # (t = 0.9045 becomes 908).
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(max_period) * k / half)                     # (dim/2,)
    angle = (1000 * t)[:, None].float() * freqs                             # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype)        # (B, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift

    x: tokens (B, S, hidden).
    shift, scale: (B, 1, hidden), the same for all tokens of a sequence."""
    # LayerNorm has no weights of its own here: the conditioning supplies scale and shift.
    return native.modulate(x, shift, scale)


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Pattern "B S (3 H D) -> B S 3 H D": a fused projection gives q, then k, then v."""
    return qkv.unflatten(-1, (3, num_heads, -1))


class MLPEmbedder(nn.Module):
    """A vector of any width -> (B, hidden): linear, SiLU, linear."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))                     # (B, hidden)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the channels of each head."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)                                     # (..., D)


class QKNorm(nn.Module):
    """The RMSNorm of the queries and that of the keys: keeps the attention scores in range.

    `attention` takes both scales at once and applies them where it rotates."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def scales(self) -> Tensor:
        return torch.stack([self.query_norm.scale, self.key_norm.scale])    # (2, D)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is computed over both streams."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)

    def project(self, x: Tensor) -> Tensor:
        return split_heads(self.qkv(x), self.num_heads)                     # (B, S, 3, H, D)


class ModulationOut(NamedTuple):
    """How the conditioning acts on one sub-layer; each (B, 1, hidden)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """vec (B, hidden) -> shift, scale and gate of each of a block's sub-layers."""

    def __init__(self, hidden_size: int, sublayers: int):
        super().__init__()
        self.sublayers = sublayers
        self.lin = Linear(hidden_size, 3 * sublayers * hidden_size)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        parts = self.lin(F.silu(vec))[:, None].chunk(3 * self.sublayers, dim=-1)  # (B, 1, hidden)
        return tuple(ModulationOut(*parts[i: i + 3]) for i in range(0, len(parts), 3))


def mlp(hidden_size: int, mlp_dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(hidden_size, mlp_dim), TanhGELU(), Linear(mlp_dim, hidden_size))


# Keys and values (B or 1, H, T, D) of further tokens that the image tokens of a block attend to.
KeysValues = Sequence[tuple[Tensor, Tensor]]


class DoubleBlock(nn.Module):
    """Two streams with weights of their own, one attention over both."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.img_mod = Modulation(hidden_size, 2)
        self.img_attn = SelfAttention(hidden_size, num_heads)
        self.img_mlp = mlp(hidden_size, mlp_dim)
        self.txt_mod = Modulation(hidden_size, 2)
        self.txt_attn = SelfAttention(hidden_size, num_heads)
        self.txt_mlp = mlp(hidden_size, mlp_dim)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor,
                kv: KeysValues = ()) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        L, N = txt.shape[1], img.shape[1]

        img_qkv = self.img_attn.project(modulate(img, img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn.project(modulate(txt, txt_mod1.shift, txt_mod1.scale))
        # Note: text tokens come before image tokens.
        attn = attention(torch.cat([txt_qkv, img_qkv], dim=1), pe,          # (B, L+N, 3, H, D)
                         self.img_attn.norm.scales(), self.txt_attn.norm.scales(), L=L)
        txt_attn, img_attn = attn.split([L, N], dim=1)                      # (B, L or N, hidden)

        # torch.addcmul(x, gate, y) is x + gate * y in one pass.
        # img = img + gate * proj(attention)
        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_attn))
        # img = img + gate * mlp(norm(img))
        normed = modulate(img, img_mod2.shift, img_mod2.scale)
        img = torch.addcmul(img, img_mod2.gate, self.img_mlp(normed))       # (B, N, hidden)
        for k, v in kv:
            # Note: with the image's queries before their rotation; neither projected nor gated.
            q = self.img_attn.norm.query_norm(img_qkv[:, :, 0].transpose(1, 2))  # (B, H, N, D)
            img = img + cross_attention(q, k, v)                            # (B, N, hidden)

        # txt = txt + gate * proj(attention)
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_attn))
        # txt = txt + gate * mlp(norm(txt))
        normed = modulate(txt, txt_mod2.shift, txt_mod2.scale)
        txt = torch.addcmul(txt, txt_mod2.gate, self.txt_mlp(normed))       # (B, L, hidden)
        return clamp_fp16(img), clamp_fp16(txt)


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side, fused into two linears."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = Linear(hidden_size, 3 * hidden_size + mlp_dim)       # rows q, k, v, mlp
        self.linear2 = Linear(hidden_size + mlp_dim, hidden_size)           # columns attention, mlp
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, 1)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        (mod,) = self.modulation(vec)
        hidden_size = x.shape[-1]
        mlp_dim = self.linear2.in_features - hidden_size

        fused = self.linear1(modulate(x, mod.shift, mod.scale))             # (B, S, 3·hidden+mlp)
        qkv, mlp_in = fused.split([3 * hidden_size, mlp_dim], dim=-1)
        attn = attention(split_heads(qkv, self.num_heads), pe, self.norm.scales())  # (B, S, hidden)
        y = self.linear2(torch.cat([attn, tanh_gelu(mlp_in)], dim=-1))      # (B, S, hidden)
        return clamp_fp16(torch.addcmul(x, mod.gate, y))                    # x + gate * y


class FinalLayer(nn.Module):
    """The last modulation and the projection of image tokens to patches of the velocity."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        # Note: shift comes before scale here, after it in the diffusers layout.
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)  # (B, 1, hidden)
        return self.linear(modulate(img, shift, scale))                     # (B, N, out_channels)


class CallMemory:
    """What is remembered from step to step while one prompt is sampled; gone when that is over."""

    def __init__(self):
        self.states: dict = {}         # whoever remembers something -> what it remembers


class MMDiTInputs(NamedTuple):
    """What the transformer is given in one step; `_replace` makes a changed copy."""

    img: Tensor                        # the state as tokens (B, N, in_channels)
    txt: Tensor                        # T5's tokens (B, L, context_in_dim)
    pooled: Tensor                     # CLIP's vector (B, vec_in_dim), as `prepare` returns it
    t: Tensor                          # time (B,) in [0, 1]
    guidance: Tensor | None            # (B,), about 1 to 10; None where `guidance_embed` is false
    img_ids: Tensor                    # positions (N, 3), integers
    txt_ids: Tensor                    # positions (L, 3), integers
    # For each block, double ones first, what is added to its image tokens (B, N, hidden), or None
    # (ControlNet).
    residuals: Sequence[Tensor | None] | None = None
    # For each double block, keys and values that its image tokens attend to as well (IP-Adapter).
    image_kv: Sequence[KeysValues] | None = None
    # t as a number, where it is one: so that it need not be read back from a GPU.
    time: float | None = None
    memory: CallMemory | None = None


class MMDiT(nn.Module):
    """The whole transformer; `forward` predicts the velocity of the image tokens."""

    def __init__(self, config: MMDiTConfig = MMDiTConfig()):
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_heads
        mlp_dim = round(hidden * config.mlp_ratio)
        self.img_in = Linear(config.in_channels, hidden)
        self.txt_in = Linear(config.context_in_dim, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(hidden, heads, mlp_dim) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleBlock(hidden, heads, mlp_dim) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(hidden, config.out_channels)

    def forward(self, inputs: MMDiTInputs) -> Tensor:
        """The velocity (B, N, out_channels) of the image tokens."""
        img, txt, vec, pe = self.embed(inputs)
        img = self.run_blocks(img, txt, vec, pe, inputs)                    # (B, N, hidden)
        return self.final_layer(img, vec)                                   # (B, N, out_channels)

    def embed(self, inputs: MMDiTInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """img (B, N, hidden), txt (B, L, hidden), vec (B, hidden) and pe (L+N, D/2, 2, 2)."""
        # Note: text tokens come before image tokens.
        ids = torch.cat([inputs.txt_ids, inputs.img_ids])                   # (L+N, 3)
        pe = rope_table(ids, self.config.axes_dim, self.config.theta)
        vec = self.conditioning(inputs.pooled, inputs.t, inputs.guidance)
        return self.img_in(inputs.img), self.txt_in(inputs.txt), vec, pe

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, inputs: MMDiTInputs,
                   first: int = 0) -> Tensor:
        """The image tokens (B, N, hidden) after all blocks from double block `first` on."""
        double, L = len(self.double_blocks), txt.shape[1]
        residuals = inputs.residuals or [None] * (double + len(self.single_blocks))
        image_kv = inputs.image_kv or [()] * double

        for i in range(first, double):
            img, txt = self.double_blocks[i](img, txt, vec, pe, image_kv[i])
            if residuals[i] is not None:
                img = img + residuals[i]

        x = torch.cat([txt, img], dim=1)                                    # (B, L+N, hidden)
        for block, residual in zip(self.single_blocks, residuals[double:]):
            x = block(x, vec, pe)
            if residual is not None:
                x = x + F.pad(residual, (0, 0, L, 0))                       # zeros for the text
        return x[:, L:]

    def prepare(self, pooled: Tensor, guidance: float, ts: Sequence[float]) -> Tensor:
        """What to give as `pooled` in the steps at the times `ts`: by default `pooled` itself."""
        return pooled

    def conditioning(self, pooled: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """Time, guidance and pooled prompt as one vector (B, hidden)."""
        if self.config.guidance_embed and guidance is None:
            raise ValueError("this transformer needs a guidance value: pass a tensor (B,)")
        if not self.config.guidance_embed and guidance is not None:
            raise ValueError("this transformer has no guidance embedding: pass guidance=None")
        vec = self.time_in(timestep_embedding(t))
        if guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        return vec + self.vector_in(pooled)                                 # (B, hidden)
