"""The CUDA kernels without a GPU: the very same source runs on the CPU (emulator/).

Oracle: the formula in float64. Then mistakes are planted in the source; each must be detected."""

from math import inf

import pytest
import torch
from emulator.build import build, missing
from emulator.run import arguments, run

from miniflux.networks.attention import attention, rope_table

KERNELS = ("norm_rope", "naive", "tiles")
# (B, H, S, D), L: around the 32 queries and 32 keys of a tile, and 32 and 64 channels of lanes
SHAPES = [
    ((1, 1, 1, 2), 0), ((2, 2, 33, 16), 5), ((1, 2, 31, 48), 31), ((1, 1, 64, 64), 0),
    ((1, 1, 70, 128), 9),
]
# around a block's 128 queries, a warp's 32, and tiles of 64 keys, or 32 where D is 128
MMA_SHAPES = [
    ((1, 1, 1, 32), 0), ((2, 2, 65, 32), 5), ((1, 1, 130, 32), 130), ((1, 2, 64, 64), 64),
    ((1, 1, 129, 64), 9), ((1, 1, 16, 64), 0), ((1, 2, 33, 128), 31), ((2, 1, 32, 128), 0),
    ((1, 1, 97, 128), 40),
]
# around a group's 64 queries, a block's 128, tiles of 128 keys, and the ring of two of them
WGMMA_SHAPES = [
    ((1, 1, 1, 64), 0), ((2, 2, 65, 64), 5), ((1, 2, 128, 64), 128), ((1, 1, 390, 64), 9),
    ((1, 1, 17, 128), 0), ((1, 2, 129, 128), 40), ((2, 1, 300, 128), 31),
]
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}        # of elements rounded to 16 bits

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def problem(shape, dtype=torch.float32):
    """qkv, pe, img_scale, txt_scale: random inputs of a kernel."""
    B, H, S, D = shape
    draw = torch.Generator().manual_seed(0)
    positions = torch.randint(50, (S, 1), generator=draw)
    pe = rope_table(positions, (D,), 10000.0).contiguous()
    qkv = torch.randn(B, S, 3, H, D, generator=draw).to(dtype)
    img_scale = (1 + 0.3 * torch.randn(2, D, generator=draw)).to(dtype)
    txt_scale = (1 + 0.3 * torch.randn(2, D, generator=draw)).to(dtype)
    return qkv, pe, img_scale, txt_scale


def expected(kernel: str, qkv, pe, img_scale, txt_scale, L: int):
    """The formula in float64."""
    qkv, img_scale, txt_scale = (x.double() for x in (qkv, img_scale, txt_scale))
    if kernel != "norm_rope":
        return attention(qkv, pe, img_scale, txt_scale, L, backend="formula")
    S = qkv.shape[1]
    is_text = (torch.arange(S) < L)[:, None, None]
    scale = torch.where(is_text, txt_scale, img_scale)[:, :, None]         # (S, 2, 1, D)
    qk = qkv[:, :, :2]                                                     # (B, S, 2, H, D)
    x = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    even, odd = x[..., ::2], x[..., 1::2]
    pe = pe[:, None, None].double()                                        # (S, 1, 1, D/2, 2, 2)
    rotated_even = pe[..., 0, 0] * even + pe[..., 0, 1] * odd
    rotated_odd = pe[..., 1, 0] * even + pe[..., 1, 1] * odd
    rotated = torch.stack([rotated_even, rotated_odd], -1).flatten(-2)
    return torch.cat([rotated, qkv[:, :, 2:]], dim=2)


def error(ours, theirs, order: float = inf) -> float:
    """The relative difference in that norm; infinite if an element of ours is not finite."""
    if ours is None or not ours.isfinite().all():
        return inf
    norm = torch.linalg.vector_norm
    return float(norm(ours.double() - theirs, order) / norm(theirs, order))


def error_of(library, kernel: str, tensors, L: int, order: float = inf, **how) -> float:
    """The relative difference of a kernel from the formula."""
    ours = run(library, kernel, *tensors, L, **how)
    return error(ours, expected(kernel, *tensors, L), order)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape, L", SHAPES, ids=str)
def test_the_kernels_compute_the_formula(library, kernel, shape, L):
    assert error_of(library, kernel, problem(shape), L) < 2e-6


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_elements_of_16_bits_are_rounded_where_they_are_stored(library, kernel, dtype):
    tensors = problem((1, 2, 40, 48), dtype)
    assert error_of(library, kernel, tensors, 7, order=2) < BOUNDS[dtype]


@pytest.mark.parametrize("hasty", [False, True], ids=["late", "hasty"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape, L", MMA_SHAPES, ids=str)
def test_tensor_cores_compute_the_formula_without_bank_conflicts(library, shape, L, dtype, hasty):
    """Whether copies arrive at once or at the last moment."""
    tensors = problem(shape, dtype)
    assert error_of(library, "mma", tensors, L, order=2, hasty=hasty) < BOUNDS[dtype]
    assert library.conflicts() == 0


@pytest.mark.parametrize("hasty", [False, True], ids=["late", "hasty"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape, L", WGMMA_SHAPES, ids=str)
def test_groups_of_warps_compute_the_formula(library, shape, L, dtype, hasty):
    """Whether copies and products happen at once or at the last moment."""
    tensors = problem(shape, dtype)
    got = error_of(library, "wgmma", tensors, L, order=2, hasty=hasty)
    assert got < BOUNDS[dtype], library.error()


TAKES = {
    torch.float32: "mma_takes_float32",
    torch.float16: "mma_takes_float16",
    torch.bfloat16: "mma_takes_bfloat16_",
}


def test_tensor_cores_take_pieces_of_16_bytes_and_leave_the_rest_to_tiles(library):
    def takes(D=64, dtype=torch.bfloat16, gap=0, offset=0):
        """gap: elements between the tokens; offset: elements in front of the first."""
        _, pe, img_scale, txt_scale = problem((1, 1, 3, D), dtype)
        width = 3 * D + gap
        memory = torch.zeros(offset + 3 * width, dtype=dtype)
        rows = memory[offset:].view(1, 3, width)
        qkv = rows[..., :3 * D].unflatten(-1, (3, 1, D))
        call = getattr(library, TAKES[dtype])
        return bool(call(*arguments(qkv, txt_scale, img_scale, pe, torch.empty_like(qkv), 0)))

    assert takes()
    assert takes(32)
    assert takes(128, torch.float16)
    assert takes(gap=8)
    assert takes(offset=8)
    assert not takes(48)
    assert not takes(96)
    assert not takes(256)
    assert not takes(dtype=torch.float32)
    assert not takes(gap=4)
    assert not takes(offset=1)


@pytest.mark.parametrize("kernel, dtype", [
    ("naive", torch.float32),
    ("tiles", torch.float32),
    ("mma", torch.float16),
    ("wgmma", torch.bfloat16),
], ids=str)
def test_a_nan_spoils_its_own_head_only(library, kernel, dtype):
    qkv, *others = problem((1, 2, 40, 64), dtype)
    qkv[0, 3, 1, 0, 5] = torch.nan                          # a key of the first head
    out = run(library, kernel, qkv, *others, 0).view(1, 40, 2, 64)
    assert out[:, :, 0].isnan().all()
    assert out[:, :, 1].isfinite().all()


# What is wrong: (file, text in it, the mistake that replaces the text).
MISTAKES = {
    "no barrier after the tile is read":
        ("tiles.cuh", "__syncthreads();                               // nobody", "// nobody"),
    "no barrier before the tile is used":
        ("tiles.cuh", "__syncthreads();                               // all", "// all"),
    "keys past the end count":
        ("tiles.cuh", "if (t + lane >= p.S) score = -INFINITY;", ""),
    "keys past the end count from one too late":
        ("tiles.cuh", "t + lane >= p.S) score", "t + lane > p.S) score"),
    "the sums do not shrink":
        ("tiles.cuh", "sums[n][i] *= shrink;", ";"),
    "the total is of one lane":
        ("tiles.cuh", "warp_sum(weight);", "weight;"),
    "the scores are not scaled":
        ("tiles.cuh", " * rsqrtf(float(D)) : 0", " : 0"),
    "only some lanes come to the barrier":
        ("tiles.cuh", "__syncthreads();                               // all",
         "if (lane < 16) __syncthreads(); // all"),
    "a warp adds up half of itself":
        ("warp.cuh", "step = N / 2; step; step /= 2) x += ",
         "step = N / 4; step; step /= 2) x += "),
    "the rotation goes the other way":
        ("norm_rope.cuh", "turns[2 * d] * even + turns", "turns[2 * d] * even - turns"),
    "keys get the scales of queries":
        ("norm_rope.cuh", "part ? p.scale_q(s) : p.scale_k(s)", "p.scale_q(s)"),
    "a token is rotated as far as the one before":
        ("norm_rope.cuh", "p.turns(s), int(p.D)", "p.turns(s ? s - 1 : 0), int(p.D)"),
    "the norm is of the sum of squares, not of their mean":
        ("norm_rope.cuh", " / D + 1e-6f", " + 1e-6f"),
    "text ends one token later":
        ("../attention.h", "s < L ? text", "s <= L ? text"),
}

KEYS_THERE = (
    "wait_for_copies();\n"
    "        __syncthreads();                                         // the keys"
)
VALUES_THERE = KEYS_THERE.replace("keys", "values")
MMA_MISTAKES = {
    "rows are stored as they come":
        ("mma.cuh", "tile + place<D>(row, chunk)", "tile + row * D + chunk * 8"),
    "rows are stored and read as they come":
        ("mma.cuh", "(chunk ^ row * BANKS / 8 % BANKS)", "chunk"),
    "rows past the end are read":
        ("mma.cuh", "t + row < S);", "true);"),
    "rows past the end are stored":
        ("mma.cuh", "s < S && n < D / 8", "n < D / 8"),
    "nobody waits for the keys":
        ("mma.cuh", KEYS_THERE, KEYS_THERE.replace("wait_for_copies();", "")),
    "nobody waits for the values":
        ("mma.cuh", VALUES_THERE, VALUES_THERE.replace("wait_for_copies();", "")),
    "no barrier before the keys are used":
        ("mma.cuh", KEYS_THERE, "wait_for_copies(); //"),
    "no barrier before the values are used":
        ("mma.cuh", VALUES_THERE, "wait_for_copies(); //"),
    "values come while others use those before":
        ("mma.cuh", KEYS_THERE, "fetch(p.v, t, values); " + KEYS_THERE),
    "keys come while others use those before":
        ("mma.cuh", VALUES_THERE, "fetch(p.k, t + KEYS, keys); " + VALUES_THERE),
    "keys come while the warp itself uses those before":
        ("mma.cuh", "fetch(p.v, t, values);", "fetch(p.v, t, values); fetch(p.k, t + KEYS, keys);"),
    "keys past the end count":
        ("mma.cuh", "if (t + KEYS > S)", "if (false)"),
    "keys past the end count from one too late":
        ("mma.cuh", "i % 2 >= S)", "i % 2 > S)"),
    "values are not transposed":
        ("mma.cuh", "load_transposed(v", "load_matrices(v"),
    "keys change places":
        ("mma.cuh", "k[0], k[2])", "k[0], k[1])"),
    "values change places":
        ("mma.cuh", "weights[m], v[2], v[3])", "weights[m], v[0], v[1])"),
    "queries change places":
        ("mma.cuh", "queries + (at ^ 16 * c)", "queries + (at ^ 16 * (c ^ 1))"),
    "every warp takes the queries of the first":
        ("mma.cuh", "(own + 16 * m) * D", "16 * m * D"),
    "weights change places":
        ("mma.cuh", "[2 * j + i / 2][i % 2 * 2 + 1]", "[2 * j + i % 2][i / 2 * 2 + 1]"),
    "the sums of half the channels shrink":
        ("mma.cuh", "n < D / 8; n++)\n                    ",
         "n < D / 16; n++)\n                    "),
    "the total does not shrink":
        ("mma.cuh", "total[r] *= shrink;", ""),
    "the largest is of two lanes":
        ("mma.cuh", "warp_max<4>", "warp_max<2>"),
    "the total is of two lanes":
        ("mma.cuh", "warp_sum<4>(total", "warp_sum<2>(total"),
    "queries get the scales of keys":
        ("mma.cuh", "p.scale_q(s), p.turns(s)", "p.scale_k(s), p.turns(s)"),
    "the powers are of 2":
        ("mma.cuh", "1.44269504f * rsqrtf", "rsqrtf"),
    "the norm is of half the lanes":
        ("norm_rope.cuh", "warp_sum<N>(squares)", "warp_sum<N / 2>(squares)"),
    "the rotation goes the other way":
        MISTAKES["the rotation goes the other way"],
    "text ends one token later":
        MISTAKES["text ends one token later"],
}

WAIT_KEYS = "wait(full + buffer, phase);"
WAIT_VALUES = "wait(full + buffer + 1, phase);"
FREE_KEYS = "if (lane == 0) arrive(empty + buffer);"
FREE_VALUES = "if (lane == 0) arrive(empty + buffer + 1);"
WGMMA_MISTAKES = {
    "nobody waits for the keys":
        ("wgmma.cuh", WAIT_KEYS, ""),
    "nobody waits for the values":
        ("wgmma.cuh", WAIT_VALUES, ""),
    "the values waited for are the keys":
        ("wgmma.cuh", WAIT_VALUES, WAIT_KEYS),
    "the phases change every round too early":
        ("wgmma.cuh", "phase = i / BUFFERS % 2", "phase = (i + 2) / BUFFERS % 2"),
    "the phase is always the first":
        ("wgmma.cuh", "phase = i / BUFFERS % 2", "phase = 0"),
    "nobody waits for empty buffers":
        ("wgmma.cuh", "wait(empty + buffer, i / BUFFERS % 2 ^ 1);", ""),
    "the producer waits for what is empty at first":
        ("wgmma.cuh", "i / BUFFERS % 2 ^ 1);", "i / BUFFERS % 2);"),
    "keys are given back before they are multiplied":
        ("wgmma.cuh", "begin_products(scores);", FREE_KEYS + " begin_products(scores);"),
    "keys are never given back":
        ("wgmma.cuh", FREE_KEYS, ""),
    "values are never given back":
        ("wgmma.cuh", FREE_VALUES, ""),
    "every lane gives the values back":
        ("wgmma.cuh", FREE_VALUES, "arrive(empty + buffer + 1);"),
    "one group gives buffers back for both":
        ("wgmma.cuh", "CONSUMERS * GROUP / LANES", "GROUP / LANES"),
    "too few bytes are announced":
        ("wgmma.cuh", "KEYS * D * sizeof(T))", "KEYS * D)"),
    "barriers are not started":
        ("wgmma.cuh", "start(full + i, 1), start", "start"),
    "no barrier after they are started":
        ("wgmma.cuh", "__syncthreads();", ""),
    "copies may not see the barriers":
        ("wgmma.cuh", "show_barriers();", ""),
    "queries are not shown to products":
        ("wgmma.cuh", "show_to_products();", ""),
    "queries of other warps may not be there yet":
        ("wgmma.cuh", "sync_group(group);", ""),
    "scores are not waited for":
        ("wgmma.cuh", "end_products(scores);", ""),
    "sums are not waited for":
        ("wgmma.cuh", "end_products(sums);", ""),
    "products begin before their registers are in order":
        ("wgmma.cuh", "begin_products(sums);", ""),
    "queries are stored as they come":
        ("wgmma.cuh", "(d % PANEL / 8 ^ row % 8)", "d % PANEL / 8"),
    "the second panel of queries is the first":
        ("wgmma.cuh", "query + at * QUERIES + piece", "query + piece"),
    "the second panel of keys is the first":
        ("wgmma.cuh", "tile + at * KEYS + piece", "tile + piece"),
    "panels of values follow too soon":
        ("wgmma.cuh", "KEYS * PANEL * sizeof(T)", "KEYS * PANEL"),
    "values are of the keys' buffer":
        ("wgmma.cuh", "tile + (D * KEYS + 16 * j * PANEL)", "tile + 16 * j * PANEL"),
    "rows of a matrix follow too soon":
        ("hopper.cuh", "uint64_t(1024 / 16) << 32", "uint64_t(512 / 16) << 32"),
    "a matrix has no order of pieces":
        ("hopper.cuh", " | uint64_t(1) << 62", ""),
    "all heads fetch the first":
        ("wgmma.cuh", "i / 2 * KEYS, h, b);", "i / 2 * KEYS, 0, b);"),
    "keys and values change places":
        ("wgmma.cuh", "i % 2 ? values : keys", "i % 2 ? keys : values"),
    "keys past the end count":
        ("wgmma.cuh", "if (t + KEYS > S)", "if (false)"),
    "keys past the end count from one too late":
        ("wgmma.cuh", "i % 2 >= S)", "i % 2 > S)"),
    "rows past the end are stored":
        ("wgmma.cuh", "s < S && n < D / 8", "n < D / 8"),
    "both groups take the same queries":
        ("wgmma.cuh", "(blockIdx.x * CONSUMERS + group) * QUERIES",
         "blockIdx.x * CONSUMERS * QUERIES"),
    "every warp takes the queries of the first":
        ("wgmma.cuh", "threadIdx.x % GROUP / LANES * 16, first", "0, first"),
    "weights change while they are multiplied":
        ("wgmma.cuh", "end_products(sums);", "weights[0][0] = 0; end_products(sums);"),
    "weights change places":
        ("wgmma.cuh", "[2 * j + i / 2][i % 2 * 2 + 1]", "[2 * j + i % 2][i / 2 * 2 + 1]"),
    "the sums do not shrink":
        ("wgmma.cuh", "sums[n][2 * r] *= shrink, ", ""),
    "the total does not shrink":
        ("wgmma.cuh", "total[r] *= shrink;", ""),
    "the largest is of two lanes":
        ("wgmma.cuh", "warp_max<4>", "warp_max<2>"),
    "the powers are of 2":
        ("wgmma.cuh", "1.44269504f * rsqrtf", "rsqrtf"),
    "queries get the scales of keys":
        ("wgmma.cuh", "p.scale_q(s), p.turns(s)", "p.scale_k(s), p.turns(s)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_detected(tmp_path, mistake):
    """A wrong kernel differs, leaves NaN of the poisoned memory, or waits for ever."""
    flags = ["-DONLY_TYPE=float", "-DONLY_CHANNELS=2"]
    library = build(tmp_path, MISTAKES[mistake], *flags)
    tensors = problem((1, 1, 45, 48))
    errors = [error_of(library, kernel, tensors, 7) for kernel in ("norm_rope", "tiles")]
    assert max(errors) > 1e-4


@pytest.mark.parametrize("mistake", MMA_MISTAKES)
def test_a_mistake_planted_among_tensor_cores_is_detected(tmp_path, mistake):
    """By the formula, by bank conflicts, or by the memory around the tensors."""
    flags = ["-DONLY_TYPE=__nv_bfloat16", "-DONLY_CHANNELS=4"]
    library = build(tmp_path, MMA_MISTAKES[mistake], *flags)
    tensors = problem((1, 1, 75, 128), torch.bfloat16)      # three tiles
    errors = [
        error_of(library, "mma", tensors, 7, order=2, hasty=hasty) for hasty in (False, True)
    ]
    assert max(errors) > BOUNDS[torch.bfloat16] or library.conflicts()


@pytest.mark.parametrize("mistake", WGMMA_MISTAKES)
def test_a_mistake_planted_among_groups_of_warps_is_detected(tmp_path, mistake):
    """By the formula, by the memory around the tensors, or by the emulator.

    The emulator detects threads that wait for ever or do what no GPU allows."""
    flags = ["-DONLY_TYPE=__nv_bfloat16", "-DONLY_CHANNELS=4"]
    library = build(tmp_path, WGMMA_MISTAKES[mistake], *flags)

    def is_detected(shape, hasty):
        tensors = problem(shape, torch.bfloat16)
        got = error_of(library, "wgmma", tensors, 7, order=2, hasty=hasty)
        return got > BOUNDS[torch.bfloat16]

    # A part of one tile, and four tiles, so that the ring is full twice.
    shapes = [(1, 2, 75, 128), (1, 1, 460, 128)]
    assert any(is_detected(shape, hasty) for shape in shapes for hasty in (False, True))
