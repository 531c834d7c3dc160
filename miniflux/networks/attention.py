"""Rotary positions and attention: how tokens exchange information.

    attention(q, k, v) = softmax(R norm(q) (R norm(k))ᵀ / √D) v

In each head, queries and keys are divided by their root mean square and scaled, which keeps the
scores in range. Then R rotates each neighbouring pair of the D channels by an angle proportional to
the token's position. So the score of two tokens depends only on the *difference* of their positions
(RoPE, Su et al. 2021, arXiv:2104.09864). In FLUX a token has three positions (reference index, row,
column), and each of them rotates its own share of the channels.

Shapes: qkv (B, S, 3, H, D) as the linear layer leaves it, with S = L text tokens followed by N
image tokens; the result is (B, S, H·D).
Which implementation computes it: `attention_backends.py`. The same in plain C++:
`csrc/reference.cpp`. Reference: `src/flux/math.py` of the original FLUX.1 repository.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .attention_backends import (
    BACKENDS,
    attention_backend,
    attention_through,
    check_backend,
    chunked,
    current_settings,
    select_backend,
)

__all__ = [
    "BACKENDS", "attention", "attention_backend", "attention_through", "cross_attention",
    "apply_rope", "formula", "norm_rope", "rms_norm", "rope_table",
]


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """The rotation matrices [[cos, -sin], [sin, cos]] of every token and channel pair.

    ids: integer positions (S, A) on A axes.
    axes_dim: how many channels each axis rotates; D is their sum. Pair i of axis a is rotated by
        position · theta^(-2i / axes_dim[a]).
    Returns (S, D/2, 2, 2) in float32.

    >>> rope_table(torch.tensor([[0]]), (2,), 10000.0).tolist()       # position 0: no rotation
    [[[[1.0, -0.0], [0.0, 1.0]]]]
    """
    # Note: float32, whatever the model's dtype: bfloat16 cannot even count to 257.
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device) / dim
        omega = theta ** -exponents                                         # (dim/2)
        angles.append(ids[:, axis, None].float() * omega)                   # (S, dim/2)
    angle = torch.cat(angles, dim=-1)                                       # (S, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (S, D/2, 2, 2)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x (..., S, D) by the table pe (S, D/2, 2, 2), in float32."""
    # Note: neighbouring channels form a pair; many other models pair channel i with i + D/2.
    even, odd = x.float().unflatten(-1, (-1, 2)).split(1, dim=-1)           # each (..., S, D/2, 1)
    rotated = torch.addcmul(pe[..., 0] * even, pe[..., 1], odd)             # (..., S, D/2, 2)
    return rotated.flatten(-2).to(x.dtype)                                  # (..., S, D)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x / rms(x) · scale over the channels of each head: x (..., D)."""
    # Note: statistics in float32, then rounded to the dtype of x before the product with the scale.
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * scale.to(x.dtype)


def norm_rope(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor,
              L: int) -> tuple[Tensor, Tensor, Tensor]:
    """R norm(q), R norm(k) and v: (B, S, 3, H, D) -> three (B, H, S, D)."""
    qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])                        # (2 and 1, B, H, S, D)
    N = qk.shape[-2] - L
    # Note: text tokens come before image tokens.
    txt = txt_scale[:, None].expand(-1, L, -1)                              # (2, L, D)
    img = img_scale[:, None].expand(-1, N, -1)                              # (2, N, D)
    scale = torch.cat([txt, img], dim=1)[:, None, None]                     # (2, 1, 1, S, D)
    q, k = apply_rope(rms_norm(qk, scale), pe)
    return q, k, v[0]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, written out: what the fast versions are checked against."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                   # (B, H, S, S)
    return scores.softmax(dim=-1) @ v                                       # (B, H, S, D)


def merge_heads(x: Tensor) -> Tensor:
    """Pattern "B H S D -> B S (H D)"."""
    return x.transpose(1, 2).flatten(2)


def attention(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor | None = None,
              L: int = 0, backend: str | None = None) -> Tensor:
    """Attention of all tokens to all tokens: softmax(R norm(q) (R norm(k))ᵀ / √D) v.

    qkv: (B, S, 3, H, D); may be overwritten.
    pe: the rotations (S, D/2, 2, 2) in float32, see `rope_table`.
    img_scale: the scales of queries and keys (2, D).
    txt_scale: those of the first L tokens (2, D); default: img_scale.
    backend: one of `BACKENDS`; default: the one in force, see `attention_backend`.
    Returns (B, S, H·D). Raises ValueError for wrong shapes, and where the backend is missing."""
    in_force, wrappers = current_settings()
    return attend_through(wrappers, backend or in_force, qkv, pe, img_scale, txt_scale, L)


def attend_through(wrappers: tuple[Callable, ...], backend: str, qkv: Tensor, pe: Tensor,
                   img_scale: Tensor, txt_scale: Tensor | None = None, L: int = 0) -> Tensor:
    """Attention inside the functions of `attention_through`, the innermost block's first."""
    if wrappers:
        *outer, function = wrappers
        inner = partial(attend_through, tuple(outer), backend)
        return function(inner, qkv, pe, img_scale, txt_scale, L)
    txt_scale = img_scale if txt_scale is None else txt_scale
    return attend(backend, qkv, pe, img_scale, txt_scale, L)


def attend(backend: str, qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor,
           L: int) -> Tensor:
    """Attention by one backend: (B, S, 3, H, D) -> (B, S, H·D)."""
    check_backend(backend)
    if backend not in ("native", "norm_rope"):              # these check for themselves
        native.check(qkv, pe, img_scale, txt_scale, L)
    automatic = backend == "auto"
    if automatic:
        backend = select_backend(qkv, pe, img_scale, txt_scale)

    if backend == "native":
        return native.attention(qkv, pe, img_scale, txt_scale, L, checked=automatic)
    if backend == "norm_rope":
        qkv = native.norm_rope(qkv, pe, img_scale, txt_scale, L)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # each (B, H, S, D)
    else:
        q, k, v = norm_rope(qkv, pe, img_scale, txt_scale, L)               # each (B, H, S, D)

    if backend == "formula":
        return merge_heads(formula(q, k, v))
    if backend == "chunked":
        return merge_heads(chunked(q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v))             # (B, S, H·D)


native.register_gradients(partial(attend, "sdpa"))


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of S queries to T other tokens, without positions: softmax(q kᵀ / √D) v.

    q: (B, H, S, D), already normalised.
    k, v: (B, H, T, D), or (1, H, T, D) for the whole batch.
    Returns (B, S, H·D)."""
    k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v))             # (B, S, H·D)
