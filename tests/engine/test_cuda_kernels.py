"""The CUDA kernels without a GPU: the very same source runs on the CPU, fiber by fiber (csrc/cuda/emulate.h).

Oracle: the formula in float64. Then mistakes are planted in the source, and each must be seen."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from miniflux.networks.attention import attention, rope_table

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("norm_rope", "naive", "tiles")
# (B, H, S, D), text tokens: around the tiles' 32 queries and 32 keys, around the lanes' 32 and 64 channels
SHAPES = [((1, 1, 1, 2), 0), ((2, 2, 33, 16), 5), ((1, 2, 31, 48), 31), ((1, 1, 64, 64), 0), ((1, 1, 70, 128), 9)]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or not (ROOT / "csrc").is_dir(), reason="there is no g++, or no source here")


def build(folder: Path, change: tuple[str, str, str] | None = None):
    """The emulated kernels as a library; change: (file, what stands there, what stands there instead)."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    if change:
        file, before, after = change
        text = (source / "cuda" / file).read_text()
        assert text.count(before) >= 1, f"{before!r} is not in {file} any more"
        (source / "cuda" / file).write_text(text.replace(before, after, 1))
    library = folder / "kernels.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++", f"-I{source}",
                    str(ROOT / "tests" / "engine" / "emulator" / "kernels.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def problem(shape, dtype=torch.float32):
    B, H, S, D = shape
    draw = torch.Generator().manual_seed(0)
    pe = rope_table(torch.randint(50, (S, 1), generator=draw), (D,), 10000.0).contiguous()
    return (torch.randn(B, S, 3, H, D, generator=draw).to(dtype), pe,
            *((1 + 0.3 * torch.randn(2, D, generator=draw)).to(dtype) for _ in range(2)))


def run(library, kernel: str, qkv, pe, image, text, L: int):
    B, S, _, H, D = qkv.shape
    qkv, out = qkv.clone(), torch.full((B, S, H * D), torch.nan, dtype=qkv.dtype)
    call = library.float32 if qkv.dtype == torch.float32 else library.bfloat
    addresses = [ctypes.c_void_p(x.data_ptr()) for x in (qkv, text, image, pe, out)]
    waits = call(kernel.encode(), (ctypes.c_int64 * 5)(B, H, S, L, D), *addresses)
    return None if waits else qkv if kernel == "norm_rope" else out


def expected(kernel: str, qkv, pe, image, text, L: int):
    qkv, image, text = (x.double() for x in (qkv, image, text))
    if kernel != "norm_rope":
        return attention(qkv, pe, image, text, L, backend="formula")
    S = qkv.shape[1]
    scale = torch.where((torch.arange(S) < L)[:, None, None], text, image)[:, :, None]      # (S, 2, 1, D)
    qk = qkv[:, :, :2]
    x = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    even, odd, turns = x[..., ::2], x[..., 1::2], pe[:, None, None].double()                # (S, 1, 1, D/2, 2, 2)
    turned = torch.stack([turns[..., 0, 0] * even + turns[..., 0, 1] * odd, turns[..., 1, 0] * even + turns[..., 1, 1] * odd], -1)
    return torch.cat([turned.flatten(-2), qkv[:, :, 2:]], dim=2)


def error(ours, theirs) -> float:
    return float("inf") if ours is None or not ours.isfinite().all() else float((ours.double() - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape, L", SHAPES, ids=str)
def test_the_kernels_compute_the_formula(library, kernel, shape, L):
    tensors = problem(shape)
    assert error(run(library, kernel, *tensors, L), expected(kernel, *tensors, L)) < 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_rounded_where_it_is_stored(library, kernel):
    tensors = problem((1, 2, 40, 48), torch.bfloat16)
    assert error(run(library, kernel, *tensors, 7), expected(kernel, *tensors, 7)) < 8e-3


@pytest.mark.parametrize("kernel", ["naive", "tiles"])
def test_a_number_that_is_none_spoils_its_own_head_only(library, kernel):
    qkv, *others = problem((1, 2, 40, 16))
    qkv[0, 3, 1, 0, 5] = torch.nan                                              # a key of the first head
    out = run(library, kernel, qkv, *others, 0).view(1, 40, 2, 16)
    assert out[:, :, 0].isnan().all() and out[:, :, 1].isfinite().all()


MISTAKES = {
    "no barrier after the tile is read": ("tiles.cuh", "__syncthreads();                               // nobody", "// nobody"),
    "no barrier before the tile is used": ("tiles.cuh", "__syncthreads();                               // all", "// all"),
    "keys past the end count": ("tiles.cuh", "if (t + lane >= p.S) score = -INFINITY;", ""),
    "keys past the end count from one too late": ("tiles.cuh", "t + lane >= p.S) score", "t + lane > p.S) score"),
    "the sums do not shrink": ("tiles.cuh", "sums[n][i] *= shrink;", ";"),
    "the total is of one lane": ("tiles.cuh", "warp_sum(weight);", "weight;"),
    "the scores are not scaled": ("tiles.cuh", " * rsqrtf(float(D)) : 0", " : 0"),
    "a warp adds up half of itself": ("warp.cuh", "int step = LANES / 2; step; step /= 2) x += ", "int step = LANES / 4; step; step /= 2) x += "),
    "the rotation turns the other way": ("norm_rope.cuh", "T(turns[2 * d] * even + turns[2 * d + 1] * odd)",
                                         "T(turns[2 * d] * even - turns[2 * d + 1] * odd)"),
    "keys get the scales of queries": ("norm_rope.cuh", "part ? p.scale_k(s) : p.scale_q(s)", "p.scale_q(s)"),
    "text begins one token later": ("norm_rope.cuh", "p.scale_k(s) : p.scale_q(s)", "p.scale_k(s + 1) : p.scale_q(s + 1)"),
    "the norm has no epsilon of its own": ("norm_rope.cuh", " / p.D + 1e-6f", " + 1e-6f"),
    "only some lanes come to the barrier": ("tiles.cuh", "__syncthreads();                               // all", "if (lane < 16) __syncthreads(); // all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(tmp_path, mistake):
    """A kernel that is wrong differs, leaves NaN of the poisoned memory, or waits for ever."""
    library = build(tmp_path, MISTAKES[mistake])
    shape, L = (1, 2, 45, 48), 7
    tensors = problem(shape)
    worst = max(error(run(library, kernel, *tensors, L), expected(kernel, *tensors, L)) for kernel in ("norm_rope", "tiles"))
    assert worst > 1e-4
