"""The attention table of `python -m miniflux.bench`: norm, rotation and attention of one block, by each backend.

The peer is what diffusers runs in a double block, operation by operation: four norms, three concatenations, two rotations,
PyTorch's attention. Beside it PyTorch's attention alone, on queries and keys that are already normalised and turned. On a GPU each
rung of the CUDA ladder (csrc/cuda) as well, and how fast the two matrix products of an attention are computed that way."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import native
from .networks.attention import BACKENDS, attention, rope_table

CPU = ((1, 4, 96, 64), (1, 4, 320, 64), (1, 24, 1536, 128))                     # (B, H, S, D)
CUDA = tuple((1, 24, S, 128) for S in (1536, 4608, 8704, 16896))
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}                             # of the norm of the difference; measured 5e-7, 9e-3


def diffusers_chain(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> Callable[[], Tensor]:
    from diffusers.models.embeddings import apply_rotary_emb

    D = qkv.shape[-1]
    norms = [nn.RMSNorm(D, eps=1e-6, device=qkv.device, dtype=qkv.dtype) for _ in range(4)]
    for norm, scale in zip(norms, (*text, *image)):
        norm.weight.data.copy_(scale)
    turns = tuple(pe[..., i, 0].repeat_interleave(2, dim=-1) for i in (0, 1))   # cos, sin: (S, D)

    def chain() -> Tensor:
        (txt_q, txt_k, txt_v), (img_q, img_k, img_v) = (x.unbind(2) for x in (qkv[:, :L], qkv[:, L:]))
        txt_q, txt_k, img_q, img_k = (norm(x) for norm, x in zip(norms, (txt_q, txt_k, img_q, img_k)))
        q, k, v = (torch.cat(pair, dim=1) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        q, k = (apply_rotary_emb(x, turns, sequence_dim=1) for x in (q, k))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)

    return chain


def measure(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype, seconds: float = 4.0) -> dict[str, float]:
    """Seconds of each way: medians of rounds in which all of them run in turn."""
    B, H, S, D = shape
    torch.manual_seed(0)
    L = S // 3
    qkv = torch.randn(B, S, 3, H, D, device=device).to(dtype)
    pe = rope_table(torch.arange(S, device=device)[:, None], (D,), 10000.0)
    text, image = (1 + 0.3 * torch.randn(2, 2, D, device=device)).to(dtype)
    names = [name for name in BACKENDS if name not in ("native", "norm_rope") or native.refusal(qkv) is None]
    if S > 1536:
        names.remove("formula")                                                 # which keeps every score: 24 x 4608 x 4608 and more
    ways = {name: partial(attention, backend=name) for name in names}
    if device == "cuda" and native.refusal(qkv) is None:
        ways |= {name: partial(native.attend, kernel=name) for name in native.RUNGS
                 if name != "wgmma" or torch.cuda.get_device_capability() == (9, 0)}
    scratch = qkv.clone()                                                       # norm_rope overwrites what it is given
    q, k, v = qkv.clone().permute(2, 0, 3, 1, 4)
    calls: dict[str, Callable[[], Tensor]] = {"diffusers": diffusers_chain(qkv, pe, image, text, L),
                                              "sdpa alone": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name, way in ways.items():
        calls[name] = partial(way, scratch, pe, image, text, L)
    expected = calls["diffusers"]().float()
    for name, way in ways.items():
        difference = float((way(qkv.clone(), pe, image, text, L).float() - expected).norm() / expected.norm())
        assert difference < BOUND[dtype], f"{name} differs from diffusers by {difference}"
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["diffusers"]) < 4:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seen[1:]) for name, seen in times.items()}  # the first round does not count


@torch.no_grad()
def bench_attention(_: str) -> None:
    device, shapes, dtypes, columns = "cpu", CPU, (torch.float32, torch.bfloat16), ("diffusers", "sdpa alone", *BACKENDS)
    if torch.cuda.is_available():
        device, shapes, dtypes, columns = "cuda", CUDA, (torch.bfloat16,), (*columns, *native.RUNGS)
    for dtype in dtypes:
        print(f"\n{'us, ' + str(dtype)[6:]:20}" + "".join(f"{name:>11}" for name in columns) + f"{'diffusers / auto':>18}")
        for shape in shapes:
            times = measure(shape, device, dtype)
            print(f"{str(shape):20}" + "".join(f"{1e6 * times[name]:11.0f}" if name in times else f"{'-':>11}" for name in columns)
                  + f"{times['diffusers'] / times['auto']:17.2f}x")
            if device == "cuda":
                B, H, S, D = shape
                work = 4e-12 * B * H * S * S * D
                print(f"{'TFLOP/s':20}" + "".join(f"{work / times[name]:11.1f}" if name in times else f"{'-':>11}" for name in columns))
