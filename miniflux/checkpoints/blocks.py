"""The number formats of llama.cpp (GGUF files): bytes -> numbers, block by block.

A row of a weight is cut into blocks of 32 or 256 neighbours; each block is stored on its own, with
its scale d as float16. The K formats have blocks of 256 in sub-blocks of 16 or 32, whose own small
integer scales s are stored in a few bits:

    Q4_0, Q5_0, Q8_0     w = d · (q - zero)
    Q4_1, Q5_1           w = d · q + m
    Q3_K, Q6_K           w = d · s · (q - zero)
    Q2_K, Q4_K, Q5_K     w = d · s · q - dmin · m
    IQ4_NL               w = d · table[q]
    IQ4_XS               w = d · s · table[q]

Each function takes the bytes of n blocks (n, bytes a block) and returns their elements
(n, elements a block) in float32.
Reference: ggml's `ggml-quants.c`; `gguf.quants` of gguf-py, which computes in float32 too.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def halves(x: Tensor) -> Tensor:
    """Bytes (n, 2·k) as k float16 numbers: (n, k) float32."""
    return x.contiguous().view(torch.float16).float()


def low_then_high(x: Tensor) -> Tensor:
    """Bytes (..., k) -> their low four bits, then their high four bits: (..., 2·k)."""
    return torch.cat([x & 15, x >> 4], dim=-1)


def bits(x: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Bytes (..., k) -> a run of k numbers for each shift: (..., len(shifts), k)."""
    return torch.stack([x >> shift & mask for shift in shifts], dim=-2)


def fifth_bits(x: Tensor) -> Tensor:
    """Four bytes (n, 4), one bit for each of 32 numbers -> 0 or 16: (n, 32)."""
    return (x[..., None] >> torch.arange(8, dtype=torch.uint8, device=x.device) & 1).flatten(1) << 4


def six_bit_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """The twelve bytes of Q4_K and Q5_K -> scales and mins of eight sub-blocks, (n, 8, 1)."""
    a, b, c = x.split(4, dim=-1)
    scales = torch.cat([a & 63, c & 15 | a >> 6 << 4], dim=-1)
    mins = torch.cat([b & 63, c >> 4 | b >> 6 << 4], dim=-1)
    return scales[..., None].float(), mins[..., None].float()


def q4_0(x: Tensor) -> Tensor:
    d, q = x.split([2, 16], dim=-1)
    return halves(d) * (low_then_high(q).float() - 8)


def q4_1(x: Tensor) -> Tensor:
    d, m, q = x.split([2, 2, 16], dim=-1)
    return halves(d) * low_then_high(q).float() + halves(m)


def q5_0(x: Tensor) -> Tensor:
    d, high, q = x.split([2, 4, 16], dim=-1)
    return halves(d) * ((low_then_high(q) | fifth_bits(high)).float() - 16)


def q5_1(x: Tensor) -> Tensor:
    d, m, high, q = x.split([2, 2, 4, 16], dim=-1)
    return halves(d) * (low_then_high(q) | fifth_bits(high)).float() + halves(m)


def q8_0(x: Tensor) -> Tensor:
    d, q = x.split([2, 32], dim=-1)
    return halves(d) * q.view(torch.int8).float()


def q2_k(x: Tensor) -> Tensor:
    s, q, d, dmin = x.split([16, 64, 2, 2], dim=-1)
    q = bits(q.unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).reshape(len(x), 16, 16)  # sub-blocks of 16
    scales = halves(d) * (s & 15).float()                                       # (n, 16)
    mins = halves(dmin) * (s >> 4).float()
    return scales[..., None] * q.float() - mins[..., None]


def q3_k(x: Tensor) -> Tensor:
    high, q, s, d = x.split([32, 64, 12, 2], dim=-1)
    low = bits(q.unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).reshape(len(x), 8, 32)
    high = bits(high, tuple(range(8)), 1)                                       # (n, 8, 32)
    # Note: a high bit of 0 subtracts 4.
    q = (low.float() - 4 * (1 - high.float())).reshape(len(x), 16, 16)
    scales = low_then_high(s[:, :8]) | bits(s[:, 8:], (0, 2, 4, 6), 3).flatten(1) << 4
    return (halves(d) * (scales.float() - 32))[..., None] * q


def q4_k(x: Tensor) -> Tensor:
    d, dmin, s, q = x.split([2, 2, 12, 128], dim=-1)
    scales, mins = six_bit_scales(s)
    q = bits(q.unflatten(-1, (4, 32)), (0, 4), 15).reshape(len(x), 8, 32)
    return halves(d)[..., None] * scales * q.float() - halves(dmin)[..., None] * mins


def q5_k(x: Tensor) -> Tensor:
    d, dmin, s, high, q = x.split([2, 2, 12, 32, 128], dim=-1)
    scales, mins = six_bit_scales(s)
    q = bits(q.unflatten(-1, (4, 32)), (0, 4), 15).reshape(len(x), 8, 32)
    q = q | bits(high, tuple(range(8)), 1) << 4
    return halves(d)[..., None] * scales * q.float() - halves(dmin)[..., None] * mins


def q6_k(x: Tensor) -> Tensor:
    low, high, s, d = x.split([128, 64, 16, 2], dim=-1)
    low = bits(low.unflatten(-1, (2, 64)), (0, 4), 15).reshape(len(x), 2, 4, 32)
    q = low | bits(high.unflatten(-1, (2, 32)), (0, 2, 4, 6), 3) << 4           # (n, 2, 4, 32)
    scales = halves(d) * s.view(torch.int8).float()                             # (n, 16)
    return scales[..., None] * (q.reshape(len(x), 16, 16).float() - 32)


# Sixteen levels, closer together around zero.
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def look_up_iq4(q: Tensor) -> Tensor:
    """Four-bit numbers -> their levels, float32."""
    return torch.tensor(IQ4_TABLE, dtype=torch.float32, device=q.device)[q.int()]


def iq4_nl(x: Tensor) -> Tensor:
    d, q = x.split([2, 16], dim=-1)
    return halves(d) * look_up_iq4(low_then_high(q))


def iq4_xs(x: Tensor) -> Tensor:
    d, high, low, q = x.split([2, 2, 4, 128], dim=-1)
    low = bits(low[..., None], (0, 4), 15).flatten(1)                           # (n, 8)
    high = bits(high[..., None], (0, 2, 4, 6), 3).flatten(1)                    # (n, 8)
    scales = (low | high << 4).float() - 32
    q = low_then_high(q.unflatten(-1, (8, 16)))                                 # (n, 8, 32)
    return (halves(d) * scales)[..., None] * look_up_iq4(q)


# Name -> (its number in the files, numbers a block, bytes a block, bytes -> numbers).
BLOCKS: dict[str, tuple[int, int, int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (2, 32, 18, q4_0), "Q4_1": (3, 32, 20, q4_1),
    "Q5_0": (6, 32, 22, q5_0), "Q5_1": (7, 32, 24, q5_1), "Q8_0": (8, 32, 34, q8_0),
    "Q2_K": (10, 256, 84, q2_k), "Q3_K": (11, 256, 110, q3_k), "Q4_K": (12, 256, 144, q4_k),
    "Q5_K": (13, 256, 176, q5_k), "Q6_K": (14, 256, 210, q6_k),
    "IQ4_NL": (20, 32, 18, iq4_nl), "IQ4_XS": (23, 256, 136, iq4_xs),
}
# The numbers of the formats that are not read here, for the error's sentence.
OTHER_BLOCKS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}
