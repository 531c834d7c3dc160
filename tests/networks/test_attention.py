"""Attention and rotary positions. Oracles by hand: trigonometry and the written-out formula."""

import doctest
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miniflux import generate, load
from miniflux.networks import attention as module
from miniflux.networks import attention_backends, native
from miniflux.networks.attention import (
    BACKENDS,
    apply_rope,
    attention,
    attention_backend,
    attention_through,
    cross_attention,
    formula,
    rms_norm,
    rope_table,
)
from miniflux.networks.attention_backends import select_backend

HERE = [name for name in BACKENDS if native._cpu or name not in ("native", "norm_rope")]


def rotate(pair: tuple[float, float], angle: float) -> list[float]:
    x, y = pair
    return [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(module) == (0, 1)


def test_each_axis_rotates_its_own_channels_in_the_order_of_the_axes():
    ids = torch.tensor([[5, 0, 0], [0, 3, 0], [1, 2, 7]])
    table = rope_table(ids, (4, 4, 8), 10000.0)
    assert table.shape == (3, 8, 2, 2)
    omegas = [1, 10000 ** -0.5, 1, 10000 ** -0.5, 1, 10000 ** -0.25, 10000 ** -0.5, 10000 ** -0.75]
    axes = [0, 0, 1, 1, 2, 2, 2, 2]
    for s in range(3):
        for pair in range(8):
            angle = ids[s, axes[pair]].item() * omegas[pair]
            expected = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            torch.testing.assert_close(table[s, pair], torch.tensor(expected), rtol=0, atol=1e-6)


def test_neighbouring_channels_form_a_rope_pair():
    pe = rope_table(torch.tensor([[2]]), (4,), 10000.0)
    x = torch.tensor([[0.3, -0.7, 1.1, 0.5]])
    expected = rotate((0.3, -0.7), 2.0) + rotate((1.1, 0.5), 2.0 * 0.01)
    torch.testing.assert_close(apply_rope(x, pe), torch.tensor([expected]), rtol=0, atol=1e-6)


def test_position_zero_rotates_nothing():
    pe = rope_table(torch.zeros(3, 3, dtype=torch.int64), (4, 4, 8), 10000.0)
    x = torch.randn(2, 5, 3, 16)
    assert torch.equal(apply_rope(x, pe), x)


def test_a_score_depends_on_the_difference_of_two_positions_only():
    q, k = torch.randn(2, 16)
    scores = []
    for shift in (0, 9, 40):
        pe = rope_table(torch.tensor([[0, 4 + shift, 7], [0, 1 + shift, 2]]), (4, 4, 8), 10000.0)
        rotated = apply_rope(torch.stack([q, k]), pe)
        scores.append(rotated[0] @ rotated[1])
    torch.testing.assert_close(scores[1:], [scores[0]] * 2, rtol=1e-4, atol=1e-4)


def test_positions_beyond_256_stay_apart():
    pe = rope_table(torch.tensor([[256], [257], [4096], [4097]]), (2,), 10000.0)
    assert pe.dtype == torch.float32
    for row, position in zip(pe, (256, 257, 4096, 4097)):
        assert abs(row[0, 0, 0].item() - math.cos(position)) < 1e-5


def test_rope_is_computed_in_float32_and_returned_in_the_dtype_of_its_input():
    pe = rope_table(torch.arange(6)[:, None], (8,), 10000.0)
    x = torch.randn(2, 6, 8).bfloat16()
    assert torch.equal(apply_rope(x, pe), apply_rope(x.float(), pe).bfloat16())


def normed(x, scale):
    """x / rms(x) · scale, by hand."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def written_out(qkv, pe, img_scale, txt_scale, L):
    """Attention of qkv (B, S, 3, H, D), with text tokens and image tokens normalised apart."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def rotated(x, txt_scale, img_scale):
        txt, img = normed(x[:, :, :L], txt_scale), normed(x[:, :, L:], img_scale)
        return apply_rope(torch.cat([txt, img], dim=2), pe)

    q = rotated(q, txt_scale[0], img_scale[0])
    k = rotated(k, txt_scale[1], img_scale[1])
    return formula(q, k, v).transpose(1, 2).flatten(2)                      # (B, S, H·D)


def problem(tokens: int = 7, batch: int = 2):
    pe = rope_table(torch.arange(3 * tokens).view(tokens, 3), (4, 4, 8), 10000.0)
    return torch.randn(batch, tokens, 3, 3, 16), pe, *(1 + 0.3 * torch.randn(2, 2, 16))


@pytest.mark.parametrize("name", HERE)
def test_every_backend_computes_the_formula_of_normalised_and_rotated_queries_and_keys(name):
    qkv, pe, img_scale, txt_scale = problem()
    for L in (0, 3, 7):
        expected = written_out(qkv, pe, img_scale, txt_scale, L)
        result = attention(qkv.clone(), pe, img_scale, txt_scale, L, backend=name)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6)
        with attention_backend(name):
            result = attention(qkv.clone(), pe, img_scale, txt_scale, L)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6)


def test_one_pair_of_scales_may_serve_all_tokens():
    qkv, pe, img_scale, _ = problem()
    assert torch.equal(attention(qkv, pe, img_scale), attention(qkv, pe, img_scale, img_scale, 4))


def test_rms_norm_subtracts_no_mean_and_survives_float16():
    scale = torch.linspace(0.5, 2, 8)
    for x in (torch.randn(3, 8) + 5, 1e-3 * torch.randn(3, 8)):
        torch.testing.assert_close(rms_norm(x, scale), normed(x, scale))
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)     # its square is not a float16 number
    big = rms_norm(x, scale)
    torch.testing.assert_close(big[0], scale.half(), rtol=1e-3, atol=0)


def test_scores_are_divided_by_the_root_of_the_head_width():
    q = torch.tensor([[[[2.0, 0, 0, 0]]]])
    k = torch.tensor([[[[3.0, 0, 0, 0], [0, 0, 0, 0]]]])
    v = torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0]]]])
    weight = math.exp(3) / (math.exp(3) + 1)                                    # 2 · 3 / √4 = 3
    torch.testing.assert_close(formula(q, k, v).flatten(), torch.tensor([weight, 1 - weight, 0, 0]))


def test_every_token_sees_every_token_and_only_its_position_orders_it():
    qkv, _, img_scale, _ = problem(9)
    ids, order = torch.randint(20, (9, 3)), torch.randperm(9)
    expected = attention(qkv, rope_table(ids, (4, 4, 8), 10000.0), img_scale)[:, order]
    result = attention(qkv[:, order], rope_table(ids[order], (4, 4, 8), 10000.0), img_scale)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_backend_is_in_force_within_its_block_only_even_after_an_error(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "formula", lambda *qkv: calls.append(1) or formula(*qkv))
    qkv, pe, img_scale, _ = problem()
    with pytest.raises(KeyboardInterrupt), attention_backend("formula"):
        attention(qkv, pe, img_scale)
        attention(qkv, pe, img_scale, backend="sdpa")       # what is asked for comes first
        raise KeyboardInterrupt
    attention(qkv, pe, img_scale)
    assert calls == [1]


def test_an_unknown_backend_is_refused_by_name():
    message = "no attention backend 'fast': expected one of auto, formula"
    with pytest.raises(ValueError, match=message), attention_backend("fast"):
        pass
    with pytest.raises(ValueError, match="no attention backend 'fast'"):
        attention(*problem(), backend="fast")


def test_a_backend_is_in_force_in_its_own_thread_only(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "formula", lambda *qkv: calls.append(1) or formula(*qkv))
    qkv, pe, img_scale, _ = problem()
    with attention_backend("formula"), ThreadPoolExecutor(1) as other:
        other.submit(attention, qkv, pe, img_scale).result()
        assert not calls
        attention(qkv, pe, img_scale)
    assert calls == [1]


def test_wrappers_are_nested_and_the_inner_one_is_called_first():
    qkv, pe, img_scale, txt_scale = problem()
    order = []

    def wrapper(name, factor):
        def through(attention, *args):
            order.append(name)
            return factor * attention(*args)
        return through

    expected = attention(qkv, pe, img_scale, txt_scale, 3)
    with attention_through(wrapper("outer", 2)):
        with attention_through(wrapper("inner", 5)):
            torch.testing.assert_close(attention(qkv, pe, img_scale, txt_scale, 3), 10 * expected)
        torch.testing.assert_close(attention(qkv, pe, img_scale, txt_scale, 3), 2 * expected)
        with ThreadPoolExecutor(1) as other:                # another thread is not wrapped
            result = other.submit(attention, qkv, pe, img_scale, txt_scale, 3).result()
    assert order == ["inner", "outer", "outer"]
    assert torch.equal(result, expected)
    assert torch.equal(attention(qkv, pe, img_scale, txt_scale, 3), expected)


def test_blocks_of_two_threads_may_end_in_any_order():
    first, second = attention_backend("formula"), attention_backend("chunked")
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert attention_backends.current_settings()[0] == "auto"
        assert other.submit(attention_backends.current_settings).result()[0] == "chunked"
        other.submit(second.__exit__, None, None, None).result()
    assert attention_backends._for_graphs == ("auto", ())


def test_a_compiled_graph_follows_the_settings_in_force():
    qkv, pe, img_scale, txt_scale = problem()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    expected = compiled(qkv, pe, img_scale, txt_scale, 3)
    torch.testing.assert_close(expected, attention(qkv, pe, img_scale, txt_scale, 3))
    for factor in (2, 3):
        with attention_through(partial(multiplied, factor)):
            result = compiled(qkv, pe, img_scale, txt_scale, 3)
            torch.testing.assert_close(result, factor * expected)
    assert torch.equal(compiled(qkv, pe, img_scale, txt_scale, 3), expected)


def multiplied(factor, attention, *args):
    return factor * attention(*args)


def test_cross_attention_shares_keys_and_values_of_a_batch_of_one():
    q, k, v = torch.randn(3, 2, 5, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    weights = (torch.einsum("bhsd,xhtd->bhst", q, k) / 8 ** 0.5).softmax(-1)
    expected = torch.einsum("bhst,xhtd->bshd", weights, v).flatten(2)
    torch.testing.assert_close(cross_attention(q, k, v), expected)


# ------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("device, dtype, tokens, gradients, expected", [
    ("cpu", torch.float32, 96, False, "native"),
    ("cpu", torch.bfloat16, 4608, False, "native"),
    ("cpu", torch.float32, 8704, False, "norm_rope"),       # packing keys and values gains nothing
    ("cpu", torch.float16, 96, False, "sdpa"),              # there is no kernel for it
    ("cpu", torch.float32, 96, True, "sdpa"),               # recomputing would be slower
    ("cuda", torch.bfloat16, 96, False, "sdpa"),
    ("mps", torch.bfloat16, 96, False, "chunked"),
    ("mps", torch.float32, 96, True, "chunked"),
])
def test_auto_chooses_by_device_dtype_and_length(monkeypatch, device, dtype, tokens, gradients,
                                                 expected):
    monkeypatch.setattr(native, "_cpu", object())           # as if it were built
    monkeypatch.setattr(native, "PLAIN", (SimpleNamespace,))  # as if there were such tensors here
    strides = (384 * tokens, 384, 128, 64, 1)
    qkv = SimpleNamespace(
        is_cpu=device == "cpu", is_cuda=device == "cuda", is_mps=device == "mps",
        dtype=dtype, layout=torch.strided, requires_grad=gradients,
        shape=(1, tokens, 3, 2, 64), stride=lambda *axis: 1 if axis else strides,
        is_neg=lambda: False, data_ptr=lambda: 64, element_size=lambda: 4,
    )
    with torch.enable_grad():
        assert select_backend(qkv, qkv, qkv, qkv) == expected
        monkeypatch.setattr(native, "_cpu", None)
        assert select_backend(qkv, qkv, qkv, qkv) in ("sdpa", "chunked")


def test_the_limit_of_a_score_matrix_is_that_of_mps():
    scores = attention_backends.MPS_SCORES
    assert scores * torch.float32.itemsize <= 2**32 and scores < 2**31


class MPSLimits(TorchDispatchMode):
    """Raises on what MPS lacks: float64, complex numbers, score matrices of more than `limit`
    numbers."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.attentions = limit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, out)):
            if isinstance(x, torch.Tensor) and (x.dtype == torch.float64 or x.is_complex()):
                raise AssertionError(f"{function} on {x.dtype}")
        if "scaled_dot_product" in str(function):
            self.attentions += 1
            q, k = args[:2]
            scores = q.shape[:-1].numel() * k.shape[-2]
            assert scores <= self.limit, f"{function} makes a score matrix of {scores} numbers"
        return out


def test_chunks_of_queries_keep_the_score_matrix_within_the_limit(monkeypatch):
    args = problem(tokens=21)
    expected = written_out(*args, 5)
    for limit, calls in ((2 * 3 * 21 * 21, 1), (2 * 3 * 21 * 8, 3), (2 * 3 * 21, 21)):
        monkeypatch.setattr(attention_backends, "MPS_SCORES", limit)
        with MPSLimits(limit) as seen:
            result = attention(*args, 5, backend="chunked")
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6)
        assert seen.attentions == calls
    message = "makes a score matrix of 2646 numbers"
    with pytest.raises(AssertionError, match=message), MPSLimits(2645):
        attention(*args, 5, backend="sdpa")


@pytest.mark.parametrize("name", HERE)
def test_a_whole_picture_is_the_same_with_every_backend(small_folder, name):
    """That `auto` paints what diffusers paints is tested in tests/parity/."""
    flux = load(small_folder, device="cpu")
    expected = generate(flux, "a red apple", steps=3, output="tensor", progress=False)
    with attention_backend(name):
        picture = generate(flux, "a red apple", steps=3, output="tensor", progress=False)
    assert (picture - expected).abs().max() < 1e-4          # measured: 6e-6


def test_a_whole_picture_needs_nothing_that_mps_lacks(monkeypatch):
    """The tiny model as on MPS: its 3 · 96 · 96 scores are more than the faked limit allows."""
    flux = load(device="cpu")
    expected = generate(flux, "a red apple", steps=2, output="tensor", progress=False)
    monkeypatch.setattr(attention_backends, "MPS_SCORES", 3 * 96 * 40)
    with attention_backend("chunked"), MPSLimits(3 * 96 * 40) as seen:
        picture = generate(flux, "a red apple", steps=2, output="tensor", progress=False)
    assert (picture - expected).abs().max() < 1e-3 and seen.attentions >= 2 * 7 * 3
