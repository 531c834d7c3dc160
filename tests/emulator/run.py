"""Runs an emulated kernel on tensors, which lie in memory full of NaN, and checks what it touched.

    out = run(build(), "tiles", qkv, pe, img_scale, txt_scale, L=0)             # (B, S, H·D)
"""

import ctypes

import torch
from torch import Tensor

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16_"}


def arguments(qkv: Tensor, txt_scale: Tensor, img_scale: Tensor, pe: Tensor, out: Tensor, L: int):
    """Sizes, strides and addresses as the library's functions take them."""
    B, S, _, H, D = qkv.shape
    addresses = [x.data_ptr() for x in (qkv, txt_scale, img_scale, pe, out)]
    return ((ctypes.c_int64 * 9)(B, H, S, L, D, *qkv.stride()[:4]),
            (ctypes.c_void_p * 5)(*addresses))


def run(library: ctypes.CDLL, kernel: str, qkv: Tensor, pe: Tensor, img_scale: Tensor,
        txt_scale: Tensor, L: int, hasty: bool = False) -> Tensor | None:
    """The result of a kernel.

    kernel: norm_rope, naive, tiles, mma or wgmma.
    qkv: (B, S, 3, H, D) in float32, float16 or bfloat16; a copy of it is used.
    pe: the rotations (S, D/2, 2, 2) in float32.
    img_scale, txt_scale: (2, D) in the dtype of qkv; the latter for the first L tokens.
    hasty: whether copies and products happen at once, instead of at the last moment.

    Returns (B, S, H·D), for norm_rope the changed qkv; None where the kernel did not end, or wrote
    where it must not."""
    B, S, _, H, D = qkv.shape
    # 64 more tokens, and 8 more elements after each, which no kernel may touch.
    rows = torch.full((B, S + 64, 3 * H * D + 8), torch.nan, dtype=qkv.dtype)
    inside = rows[:, :S, :-8].unflatten(-1, (3, H, D))
    inside.copy_(qkv)
    out = torch.full((B * S + 64, H * D), torch.nan, dtype=qkv.dtype)
    name = NAMES[qkv.dtype]
    function = getattr(library, name if hasattr(library, name) else "only")
    ended = function(kernel.encode(), *arguments(inside, txt_scale, img_scale, pe, out, L),
                     ctypes.c_bool(hasty))
    intact = torch.equal(inside[:, :, 2], qkv[:, :, 2])
    intact &= bool(out[B * S:].isnan().all() and rows[:, S:].isnan().all())
    if kernel in ("mma", "wgmma"):                      # they rotate queries as they read them
        intact &= torch.equal(inside[:, :, 0], qkv[:, :, 0])
    if not ended or not intact:
        return None
    return inside if kernel == "norm_rope" else out[:B * S].view(B, S, -1)
