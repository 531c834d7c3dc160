"""Every compiled kernel on random tensors: shapes that may not fit, any strides, offsets, dtypes,
defaults of PyTorch. Oracle: PyTorch's operations on contiguous copies, or the error that they
raise. Each seed is one case, so that a failure can be repeated.

To look for foreign memory, build the kernels with `-fsanitize=address` and run this file with
libasan and libstdc++ preloaded."""

import os
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miniflux.networks import native
from miniflux.networks.attention import attention, norm_rope

pytestmark = pytest.mark.skipif(
    native._cpu is None and os.environ.get("MINIFLUX_REQUIRE_NATIVE") != "1",
    reason="miniflux._cpu is not built: there is no compiler here",
)

CASES = 2000  # of each of the five tests
ERRORS = (RuntimeError, ValueError, IndexError, TypeError)
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def tensor(draw: random.Random, shape: tuple[int, ...], dtype=torch.float32) -> Tensor:
    """Random elements, laid out in memory in one of many ways."""
    x = torch.randn(shape).to(dtype)
    way = draw.choice(("plain", "plain", "part", "part", "permuted", "steps", "expanded",
                       "misaligned", "negated", "frozen"))
    if way == "part":                                     # of a wider tensor, as fused weights give
        ends = [(draw.randint(0, 3), draw.randint(0, 3)) for _ in shape]
        whole = torch.randn([a + n + b for n, (a, b) in zip(shape, ends)]).to(dtype)
        part = whole[tuple(slice(a, a + n) for n, (a, b) in zip(shape, ends))]
        return part.copy_(x)
    if way == "permuted":
        order = draw.sample(range(len(shape)), len(shape))
        back = [order.index(i) for i in range(len(shape))]
        return x.permute(order).contiguous().permute(back)
    if way == "steps" and shape:
        axis = draw.randrange(len(shape))
        wide = x.repeat_interleave(2, axis)
        return wide[(slice(None),) * axis + (slice(None, None, 2),)]
    if way == "expanded" and shape:
        axis = draw.randrange(len(shape))
        return x.narrow(axis, 0, 1).expand(shape) if shape[axis] else x
    if way == "misaligned" and x.numel():
        memory = bytearray(x.nbytes + 1)
        y = torch.frombuffer(memory, dtype=dtype, offset=1, count=x.numel()).view(shape)
        return y.copy_(x)
    if way == "negated":
        return torch._neg_view(x)
    if way == "frozen":
        return torch.nn.Parameter(x, requires_grad=False)
    return x


def mostly(draw: random.Random, usual, *others):
    return usual if draw.random() < 0.85 else draw.choice(others)


def first_result(function: Callable, *attempts: list[Tensor]) -> Tensor | None:
    """The result for the first arguments that are not refused."""
    for tensors in attempts:
        try:
            return function(*tensors)
        except ERRORS:
            pass
    return None


def is_close(result: Tensor, expected: Tensor, bound: float) -> bool:
    bound = max(bound, 4 * torch.finfo(expected.dtype).eps)
    return float((result - expected).abs().max()) < bound * (1 + float(expected.abs().max()))


def compare(draw: random.Random, call: Callable, oracle: Callable, tensors: list[Tensor],
            bound: float = 2e-5, may_refuse: bool = False,
            is_right: Callable[..., bool] | None = None) -> None:
    """call(*tensors) equals oracle(*copies), or both raise an error.

    is_right: judges the result for the copies, instead of the distance to the oracle's."""
    copies = [x.detach().clone().contiguous() for x in tensors]
    if draw.random() < 0.1 and all(type(x) is Tensor for x in tensors):
        tensors = [x.requires_grad_() for x in tensors]
    expected = first_result(oracle, copies, tensors)        # PyTorch may refuse one layout only
    dtype, device = draw.choice((torch.float32, *DTYPES)), draw.choice(("cpu", "meta"))
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.set_grad_enabled(draw.random() < 0.5):
            result = call(*tensors)
    except ERRORS:
        assert expected is None or may_refuse
        return
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None, "accepted what PyTorch refuses"
    assert result.shape == expected.shape and result.dtype == expected.dtype and result.is_cpu
    if result.numel():
        assert is_right(result, *copies) if is_right else is_close(result, expected, bound)
    for x, copy in zip(tensors, copies):
        assert torch.equal(x, copy)                         # inputs are never written to


def cases(entry: str):
    """Every case has a generator of its own."""
    for case in range(CASES):
        torch.manual_seed(case)
        yield random.Random(f"{entry} {case}")


def rows(draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.choice((0, 1, 1, 1, 2, 3, 5, 9)) for _ in range(draw.randint(0, 2)))


def test_linear():
    taken = 0
    for draw in cases("linear"):
        K, N = draw.choice((1, 2, 7, 16, 33)), draw.choice((16, 16, 16, 32, 48, 20))
        dtype = mostly(draw, torch.float32, *DTYPES)
        x = tensor(draw, (*rows(draw), mostly(draw, K, 0, 1, K + 3)), dtype)
        if draw.random() < 0.7:
            weight = torch.randn(K, N, dtype=dtype).t()     # by columns
            if draw.random() < 0.3:                         # a part of a fused weight
                weight = torch.randn(K + 4, N + 16, dtype=dtype)[2:-2, 16:].t()
        else:
            weight = tensor(draw, (N, K), dtype)
        bias = tensor(draw, (mostly(draw, N, 1, 0, N + 1),), mostly(draw, dtype, *DTYPES))
        with torch.no_grad():
            taken += native.takes_linear(x, weight, bias)
        compare(draw, native.linear, F.linear, [x, weight, bias])
    assert taken > CASES / 12                               # the kernel itself was tried, too


def test_gelu():
    taken = 0
    for draw in cases("gelu"):
        x = tensor(draw, (*rows(draw), draw.choice((0, 1, 2, 15, 16, 40))),
                   mostly(draw, torch.float32, *DTYPES))
        if draw.random() < 0.05:
            x = torch.randn(())
        with torch.no_grad():
            taken += native.takes(x)
        compare(draw, native.gelu, lambda x: F.gelu(x, approximate="tanh"), [x])
    assert taken > CASES / 5


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def is_modulated(result: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> bool:
    """Whether each element differs from float64 by the rounding of its terms alone.

    The mean is rounded at the size of x; the norm then divides by the standard deviation, which is
    1e-3 where all channels are equal. Measured in units of eps · terms: 1.8 at most for the kernel,
    2.1 for PyTorch's operations."""
    eps = torch.finfo(x.dtype).eps
    x, shift, scale = x.double(), shift.double(), scale.double()
    deviation = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    largest = x.abs().amax(-1, keepdim=True) / deviation
    exact = modulated(x, shift, scale)
    terms = (1 + scale).abs() * largest + shift.abs() + exact.abs()
    return bool(((result.double() - exact).abs() <= 4 * eps * terms).all())


def test_modulate():
    taken = 0
    for draw in cases("modulate"):
        B, S = draw.choice((0, 1, 1, 2, 3)), draw.choice((0, 1, 2, 5))
        n = draw.choice((1, 2, 3, 8, 16, 33))
        dtype = mostly(draw, torch.float32, *DTYPES)
        x = tensor(draw, mostly(draw, (B, S, n), (S, n), (n,), (B, S, n + 1), (1, B, S, n)), dtype)
        shape = mostly(draw, (B, 1, n), (1, 1, n), (B, S, n), (n,), (B, 1, n + 1), (B + 1, 1, n))
        if draw.random() < 0.4 and len(shape) == 3:         # as the modulation gives them
            shift, scale = torch.randn(*shape[:2], 6 * shape[2], dtype=dtype).chunk(6, -1)[1:3]
        else:
            shift = tensor(draw, shape, dtype)
            scale = tensor(draw, mostly(draw, shape, (n,), (1, 1, 1)), dtype)
        with torch.no_grad():
            taken += native.takes(x, shift, scale)
        compare(draw, native.modulate, modulated, [x, shift, scale], is_right=is_modulated)
    assert taken > CASES / 10


def attention_problem(draw: random.Random) -> tuple[list[Tensor], int]:
    B, S = draw.choice((0, 1, 1, 2)), draw.choice((0, 1, 2, 5, 17, 33))
    H, D = draw.choice((1, 2, 3)), draw.choice((2, 4, 6, 16, 20))
    dtype = mostly(draw, torch.float32, torch.bfloat16, torch.float64)
    qkv = tensor(draw, mostly(draw, (B, S, 3, H, D), (B, S, 2, H, D), (B, S, 3, H, D + 1)), dtype)
    pe = tensor(draw, (mostly(draw, S, S + 1, 1), D // 2, 2, 2),
                mostly(draw, torch.float32, torch.bfloat16))
    scales = [tensor(draw, (2, mostly(draw, D, D + 2, 1)), mostly(draw, dtype, *DTYPES))
              for _ in range(2)]
    return [qkv, pe, *scales], draw.randint(0, S) if draw.random() < 0.95 else S + 1


def test_attention():
    taken = 0
    for draw in cases("attention"):
        tensors, L = attention_problem(draw)
        backend = draw.choice(("auto", "auto", "native"))
        with torch.no_grad():
            taken += native.refusal(*tensors) is None
        compare(
            draw,
            partial(attention, L=L, backend=backend),
            partial(attention, L=L, backend="formula"),
            tensors,
            bound=1e-4 if tensors[0].dtype != torch.bfloat16 else 3e-2,
            may_refuse=backend == "native",
        )
    assert taken > CASES / 5


def test_norm_rope():
    done = 0
    for draw in cases("norm_rope"):
        (qkv, *others), L = attention_problem(draw)
        before = qkv.clone().contiguous()
        base = qkv._base if qkv._base is not None else qkv
        around = base.clone() if not base.is_neg() else None
        try:
            with torch.device(draw.choice(("cpu", "meta"))):
                native.norm_rope(qkv, *others, L)
        except ValueError:
            assert torch.equal(qkv, before)                 # refused before anything was written
            continue
        done += 1
        assert not native.elements_overlap(qkv)
        for ours, expected in zip(qkv.permute(2, 0, 3, 1, 4), norm_rope(before, *others, L)):
            bound = 1e-4 if qkv.dtype == torch.float32 else 4e-2
            torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)
        qkv.copy_(before)
        assert around is None or torch.equal(base, around)  # elements beside qkv are untouched
    assert done > CASES / 5
