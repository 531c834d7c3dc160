"""Rotary positions and attention: how tokens find each other.

    attention(q, k, v) = softmax(R q (R k)ᵀ / √D) v

R rotates each neighbouring pair of the D channels by an angle proportional to the token's position, so that the score
of two tokens depends on the *difference* of their positions only (RoPE, Su et al. 2021, arXiv:2104.09864). FLUX gives
each token three positions (reference index, row, column) and each of them its own share of the channels.

Shapes: q, k, v (B, H, S, D) with S = L text tokens followed by N image tokens; the result is (B, S, H·D). Queries and keys are
treated alike up to the product, so they travel as one tensor qk (2, B, H, S, D).
Reference: `src/flux/math.py` of the original FLUX.1 repository.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """The rotation matrices [[cos, -sin], [sin, cos]] of every token and channel pair.

    `ids` (S, A) holds integer positions on A axes; axis a turns axes_dim[a] channels, pair i of them by the angle
    position · theta^(-2i / axes_dim[a]). Returns (S, D/2, 2, 2) with D = sum(axes_dim), in float32.

    >>> rope_table(torch.tensor([[0]]), (2,), 10000.0).tolist()       # position 0 turns nothing
    [[[[1.0, -0.0], [0.0, 1.0]]]]
    """
    # Note: float32, whatever the model's dtype: bfloat16 cannot even count to 257.
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device) / dim)
        angles.append(ids[:, axis, None].float() * omega)                       # (S, dim/2)
    angle = torch.cat(angles, dim=-1)                                           # (S, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))     # (S, D/2, 2, 2)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x (..., S, D) by the table pe (S, D/2, 2, 2), in float32."""
    # Note: neighbouring channels form a pair; many other models pair channel i with i + D/2.
    even, odd = x.float().unflatten(-1, (-1, 2)).split(1, dim=-1)               # each (..., S, D/2, 1)
    rotated = torch.addcmul(pe[..., 0] * even, pe[..., 1], odd)                 # (..., S, D/2, 2)
    return rotated.flatten(-2).to(x.dtype)                                      # (..., S, D)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, written out: the definition the fast versions are checked against."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                       # (B, H, S, S)
    return scores.softmax(dim=-1) @ v                                           # (B, H, S, D)


BACKENDS = {"formula": formula, "sdpa": F.scaled_dot_product_attention}
_backend = "sdpa"


@contextmanager
def attention_backend(name: str):
    """Within `with attention_backend("formula"):` attention is computed by that entry of BACKENDS."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"there is no attention backend {name!r}: expected one of {', '.join(BACKENDS)}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def attention(qk: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """RoPE on queries and keys (2, B, H, S, D), then attention over all S tokens without a mask; v (B, H, S, D)
    -> (B, S, H·D)."""
    q, k = apply_rope(qk, pe)                                                   # each (B, H, S, D)
    x = BACKENDS[_backend](q, k, v)                                             # (B, H, S, D)
    return x.transpose(1, 2).flatten(2)                                         # (B, S, H·D)


def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (B, H, S, D) that look at T tokens without positions, k and v (B or 1, H, T, D) -> (B, S, H·D)."""
    k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
    x = F.scaled_dot_product_attention(q, k, v)                                 # (B, H, S, D)
    return x.transpose(1, 2).flatten(2)                                         # (B, S, H·D)
