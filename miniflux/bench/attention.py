"""The table `attention`: norm, rotation and attention of one block, by each backend.

The peer is what diffusers runs in a double block, operation by operation: four norms, three
concatenations, two rotations, PyTorch's attention. Beside it, PyTorch's attention alone, on queries
and keys that are already normalised and rotated. On a GPU also each kernel of the CUDA ladder
(csrc/cuda), and the speed at which the two matrix products of an attention are computed.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import native
from ..networks.attention import BACKENDS, attention, rope_table

CPU = ((1, 4, 96, 64), (1, 4, 320, 64), (1, 24, 1536, 128))     # (B, H, S, D)
CUDA = tuple((1, 24, S, 128) for S in (1536, 4608, 8704, 16896))
# Of the norm of the difference; measured 5e-7 and 9e-3.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LONGEST_FORMULA = 1536                 # tokens; the formula stores every score

Way = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]   # of computing attention(qkv, ...)


def diffusers_way(pe: Tensor, img_scale: Tensor, txt_scale: Tensor) -> Way:
    """diffusers' operations, in the order of its double block."""
    from diffusers.models.embeddings import apply_rotary_emb

    norms = []
    for scale in (*txt_scale, *img_scale):
        norm = nn.RMSNorm(len(scale), eps=1e-6, device=scale.device, dtype=scale.dtype)
        norm.weight.data.copy_(scale)
        norms.append(norm)
    txt_norm_q, txt_norm_k, img_norm_q, img_norm_k = norms
    cos, sin = (pe[..., i, 0].repeat_interleave(2, dim=-1) for i in (0, 1))     # (S, D)

    def way(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int) -> Tensor:
        txt_q, txt_k, txt_v = qkv[:, :L].unbind(2)                              # (B, L, H, D)
        img_q, img_k, img_v = qkv[:, L:].unbind(2)                              # (B, N, H, D)
        q = torch.cat([txt_norm_q(txt_q), img_norm_q(img_q)], dim=1)            # (B, S, H, D)
        k = torch.cat([txt_norm_k(txt_k), img_norm_k(img_k)], dim=1)
        v = torch.cat([txt_v, img_v], dim=1)
        q = apply_rotary_emb(q, (cos, sin), sequence_dim=1)
        k = apply_rotary_emb(k, (cos, sin), sequence_dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # (B, H, S, D)
        x = F.scaled_dot_product_attention(q, k, v)
        return x.transpose(1, 2).flatten(2)                                     # (B, S, H·D)

    return way


def ways(qkv: Tensor) -> dict[str, Way]:
    """Each backend that takes this tensor and, on a GPU, each kernel of the ladder."""
    compiled = native.refusal(qkv) is None
    names = [name for name in BACKENDS if compiled or name not in ("native", "norm_rope")]
    if qkv.shape[1] > LONGEST_FORMULA:
        names.remove("formula")
    found: dict[str, Way] = {name: partial(attention, backend=name) for name in names}
    if qkv.is_cuda and compiled:
        hopper = torch.cuda.get_device_capability() == (9, 0)
        for name in native.RUNGS:
            if hopper or name != "wgmma":
                found[name] = partial(native.attend, kernel=name)
    return found


def seconds_in_turn(calls: dict[str, Callable[[Tensor], Tensor]], qkv: Tensor,
                    seconds: float) -> dict[str, float]:
    """The median time of each call, which is given a fresh copy of qkv every time.

    Note: some ways overwrite qkv. If they were given their own result again and again, its weak
    channels would decay into denormal numbers, which some processors compute a hundred times
    slower. The copy is made before the clock starts, for all ways alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    scratch = torch.empty_like(qkv)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 4:
        for name, call in calls.items():
            scratch.copy_(qkv)
            synchronize(qkv)
            began = time.perf_counter()
            call(scratch)
            synchronize(qkv)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seen[1:]) for name, seen in times.items()}


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype,
            seconds: float = 4.0) -> dict[str, float]:
    """Seconds of each way, after all of them were compared with diffusers.

    shape: (B, H, S, D).
    seconds: how long to measure; at least four rounds."""
    B, H, S, D = shape
    L = S // 3
    torch.manual_seed(0)
    qkv = torch.randn(B, S, 3, H, D, device=device).to(dtype)
    pe = rope_table(torch.arange(S, device=device)[:, None], (D,), 10000.0)
    txt_scale, img_scale = (1 + 0.3 * torch.randn(2, 2, D, device=device)).to(dtype)
    arguments = (pe, img_scale, txt_scale, L)
    ours = ways(qkv)
    peer = diffusers_way(pe, img_scale, txt_scale)

    expected = peer(qkv, *arguments).float()
    for name, way in ours.items():
        error = float((way(qkv.clone(), *arguments).float() - expected).norm() / expected.norm())
        assert error < BOUND[dtype], f"{name} differs from diffusers by {error}"

    q, k, v = qkv.clone().permute(2, 0, 3, 1, 4)                                # (B, H, S, D)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "diffusers": lambda qkv: peer(qkv, *arguments),
        "sdpa alone": lambda qkv: F.scaled_dot_product_attention(q, k, v)}
    for name, way in ours.items():
        calls[name] = lambda qkv, way=way: way(qkv, *arguments)
    return seconds_in_turn(calls, qkv, seconds)


@torch.no_grad()
def bench_attention(_source: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    shapes = CUDA if on_gpu else CPU
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    columns = ("diffusers", "sdpa alone", *BACKENDS, *(native.RUNGS if on_gpu else ()))

    def row(title: str, values: dict[str, str], end: str = "") -> None:
        print(f"{title:20}" + "".join(f"{values.get(name, '-'):>11}" for name in columns) + end)

    for dtype in dtypes:
        title = f"us, {str(dtype).removeprefix('torch.')}"
        print()
        row(title, {name: name for name in columns}, f"{'diffusers / auto':>18}")
        for shape in shapes:
            times = measure(shape, device, dtype)
            ratio = times["diffusers"] / times["auto"]
            row(str(shape), {name: f"{1e6 * t:.0f}" for name, t in times.items()},
                f"{ratio:17.2f}x")
            if on_gpu:
                B, H, S, D = shape
                work = 4e-12 * B * H * S * S * D            # two products, in TFLOP
                row("TFLOP/s", {name: f"{work / t:.1f}" for name, t in times.items()})
