"""Rotary positions and attention: how tokens find each other.

    attention(q, k, v) = softmax(R norm(q) (R norm(k))ᵀ / √D) v

Per head, queries and keys are divided by their root mean square and scaled (which keeps the scores in range); then R rotates
each neighbouring pair of the D channels by an angle proportional to the token's position, so that the score of two tokens depends
on the *difference* of their positions only (RoPE, Su et al. 2021, arXiv:2104.09864). FLUX gives each token three positions
(reference index, row, column) and each of them its own share of the channels.

Shapes: qkv (B, S, 3, H, D) as the linear layer leaves it, with S = L text tokens followed by N image tokens; the result is
(B, S, H·D). The same in plain C++: `csrc/reference.cpp`. Reference: `src/flux/math.py` of the original FLUX.1 repository.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import native  # Note: the one thing that networks know of the engine: it knows only torch itself


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


def head_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x / rms(x) · scale over the channels of each head: x (..., D)."""
    # Note: statistics in float32, then rounded to the dtype of x before the product with the scale.
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * scale.to(x.dtype)


def norm_rope(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised and rotated, values as they are: (B, S, 3, H, D) -> three (B, H, S, D)."""
    qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])                            # (2, B, H, S, D), (1, B, H, S, D)
    S = qk.shape[-2]
    scale = torch.cat([text[:, None].expand(-1, L, -1), image[:, None].expand(-1, S - L, -1)], dim=1)  # (2, S, D)
    q, k = apply_rope(head_norm(qk, scale[:, None, None]), pe)
    return q, k, v[0]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, written out: the definition the fast versions are checked against."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                       # (B, H, S, S)
    return scores.softmax(dim=-1) @ v                                           # (B, H, S, D)


MPS_SCORES = 2**30  # numbers in one score matrix: 4 GiB of float32, and fewer than the 2^31 that Apple's kernels can count


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, a few queries at a time where a score matrix would be larger than MPS can hold."""
    rows = max(1, MPS_SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)], dim=2)


CORES = {"formula": formula, "sdpa": F.scaled_dot_product_attention, "chunked": chunked}
BACKENDS = ("auto", *CORES, "native", "norm_rope")
_backend = "auto"


@contextmanager
def attention_backend(name: str):
    """Within `with attention_backend("formula"):` attention is computed that way.

    formula      written out                        native      normalised, rotated and attended to by one compiled kernel
    sdpa         PyTorch's attention                norm_rope   normalised and rotated by a compiled kernel, then sdpa
    chunked      sdpa, in pieces where it is large  auto        what was measured fastest of those that are here
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"there is no attention backend {name!r}: expected one of {', '.join(BACKENDS)}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


_through: Callable | None = None


@contextmanager
def attention_through(function: Callable | None):
    """Within it, each attention(qkv, pe, image, text, L) is function(attention, qkv, pe, image, text, L): for what lies elsewhere."""
    global _through
    previous, _through = _through, function
    try:
        yield
    finally:
        _through = previous


def choose(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor) -> str:
    """The fastest backend for these tensors."""
    if qkv.device.type == "mps":
        return "chunked"
    # With CUDA nothing has been measured yet; there the kernels work for those who ask by name.
    # In modes and transforms the kernels cannot be seen; compiled graphs hold them as one operation.
    if (
        qkv.device.type != "cpu"
        or not (native.is_eager() or torch.compiler.is_compiling())
        or native.needs_gradients(qkv, pe, image, text)
        or native.refusal(qkv, pe, image, text)
    ):
        return "sdpa"
    if qkv.shape[1] <= 4608:
        return "native"
    # Measured on two cores: the kernel takes 0.55 to 0.9 of the time of norm_rope from 96 tokens to
    # 4608, and as long from 8704 on, where its packed copy of keys and values is only memory.
    return "sdpa" if native.elements_overlap(qkv) else "norm_rope"


def attention(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor | None = None, L: int = 0, backend: str | None = None) -> Tensor:
    """Attention of all tokens to all tokens: qkv (B, S, 3, H, D), the table pe (S, D/2, 2, 2) -> (B, S, H·D).

    `image` (2, D) scales queries and keys, `text` those of the first L tokens. `backend`: see `attention_backend`, whose is the
    default. Wrong shapes, and a backend that cannot do it, are a ValueError. qkv may be overwritten."""
    if (through := _through) is not None:
        with attention_through(None):
            return through(partial(attention, backend=backend), qkv, pe, image, text, L)
    text = image if text is None else text
    return compute(backend or _backend, qkv, pe, image, text, L)


def compute(name: str, qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> Tensor:
    """The attention of one backend."""
    if name not in BACKENDS:
        raise ValueError(f"there is no attention backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name not in ("native", "norm_rope"):                                     # these check for themselves
        native.check(qkv, pe, image, text, L)
    chosen = name == "auto"
    if chosen:
        name = choose(qkv, pe, image, text)
    if name == "native":
        return native.attention(qkv, pe, image, text, L, checked=chosen)
    if name == "norm_rope":
        q, k, v = native.norm_rope(qkv, pe, image, text, L).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)                             # (B, H, S, D)
    else:
        x = CORES[name](*norm_rope(qkv, pe, image, text, L))                    # (B, H, S, D)
    return x.transpose(1, 2).flatten(2)                                         # (B, S, H·D)


native.register_gradients(partial(compute, "sdpa"))


def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (B, H, S, D) that look at T tokens without positions, k and v (B or 1, H, T, D) -> (B, S, H·D)."""
    k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
    x = F.scaled_dot_product_attention(q, k, v)                                 # (B, H, S, D)
    return x.transpose(1, 2).flatten(2)                                         # (B, S, H·D)
