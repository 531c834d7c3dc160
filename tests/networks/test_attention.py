"""Attention and rotary positions against oracles by hand: plain trigonometry and the written-out formula."""

import doctest
import math

import pytest
import torch

from miniflux.networks import attention as module
from miniflux.networks.attention import (
    BACKENDS,
    apply_rope,
    attention,
    attention_backend,
    formula,
    rope_table,
)


def rotate(pair: tuple[float, float], angle: float) -> list[float]:
    x, y = pair
    return [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(module) == (0, 1)


def test_each_axis_turns_its_own_channels_in_the_order_of_the_axes():
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


def test_position_zero_turns_nothing():
    pe = rope_table(torch.zeros(3, 3, dtype=torch.int64), (4, 4, 8), 10000.0)
    x = torch.randn(2, 5, 3, 16)
    assert torch.equal(apply_rope(x, pe), x)


def test_a_score_depends_on_the_difference_of_two_positions_only():
    q, k = torch.randn(2, 16)
    scores = []
    for shift in (0, 9, 40):
        pe = rope_table(torch.tensor([[0, 4 + shift, 7], [0, 1 + shift, 2]]), (4, 4, 8), 10000.0)
        turned = apply_rope(torch.stack([q, k]), pe)
        scores.append(turned[0] @ turned[1])
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


def test_the_fast_attention_is_the_formula_after_rope_and_values_are_not_turned():
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    pe = rope_table(torch.arange(21).view(7, 3), (4, 4, 8), 10000.0)
    expected = formula(apply_rope(q, pe), apply_rope(k, pe), v)                 # (B, H, S, D)
    result = attention(torch.stack([q, k]), v, pe)
    assert result.shape == (2, 7, 48)
    for head in range(3):
        torch.testing.assert_close(result[..., 16 * head: 16 * head + 16], expected[:, head], rtol=1e-5, atol=1e-6)


def test_scores_are_divided_by_the_root_of_the_head_width():
    q = torch.tensor([[[[2.0, 0, 0, 0]]]])
    k = torch.tensor([[[[3.0, 0, 0, 0], [0, 0, 0, 0]]]])
    v = torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0]]]])
    weight = math.exp(3) / (math.exp(3) + 1)                                    # 2 · 3 / √4 = 3
    torch.testing.assert_close(formula(q, k, v).flatten(), torch.tensor([weight, 1 - weight, 0, 0]))


def test_every_token_sees_every_token_and_only_its_position_orders_it():
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    ids = torch.randint(20, (9, 3))
    order = torch.randperm(9)
    expected = attention(torch.stack([q, k]), v, rope_table(ids, (4, 4, 8), 10000.0))[:, order]
    q, k, v = (x[:, :, order] for x in (q, k, v))
    result = attention(torch.stack([q, k]), v, rope_table(ids[order], (4, 4, 8), 10000.0))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_computes_the_formula(name):
    q, k, v = torch.randn(3, 2, 3, 7, 16)
    pe = rope_table(torch.arange(21).view(7, 3), (4, 4, 8), 10000.0)
    expected = formula(apply_rope(q, pe), apply_rope(k, pe), v).transpose(1, 2).flatten(2)
    with attention_backend(name):
        torch.testing.assert_close(attention(torch.stack([q, k]), v, pe), expected, rtol=1e-5, atol=1e-6)


def test_a_backend_is_in_force_within_its_block_only_even_after_an_error(monkeypatch):
    calls = []
    monkeypatch.setitem(BACKENDS, "formula", lambda *qkv: calls.append(1) or formula(*qkv))
    q, pe = torch.randn(1, 1, 2, 4), rope_table(torch.zeros(2, 1), (4,), 10000.0)
    with pytest.raises(KeyboardInterrupt), attention_backend("formula"):
        attention(torch.stack([q, q]), q, pe)
        raise KeyboardInterrupt
    attention(torch.stack([q, q]), q, pe)
    assert calls == [1]


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="no attention backend 'fast'"):
        with attention_backend("fast"):
            pass
