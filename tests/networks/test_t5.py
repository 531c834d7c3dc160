"""The T5 encoder.

Oracles by hand: the official number of parameters, the list of buckets, each layer written out."""

import doctest
import math

import pytest
import torch

from miniflux.networks import t5 as module
from miniflux.networks.t5 import (
    T5,
    T5FF,
    T5Attention,
    T5Config,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
    clamp_fp16,
    relative_position_bucket,
)

SMALL = T5Config(d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, vocab_size=30)


@pytest.fixture(scope="module")
def t5() -> T5:
    torch.manual_seed(0)
    return T5(SMALL)


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(module) == (0, 1)


def test_the_official_sizes_have_the_official_number_of_parameters():
    with torch.device("meta"):
        model = T5()
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    assert len(model.state_dict()) == 219


def test_only_the_first_block_owns_a_table_and_the_names_are_the_official_ones(t5):
    expected = {"shared.weight", "encoder.final_layer_norm.weight"}
    for i in range(2):
        block = f"encoder.block.{i}.layer"
        expected |= {f"{block}.{j}.layer_norm.weight" for j in (0, 1)}
        expected |= {f"{block}.0.SelfAttention.{x}.weight" for x in "qkvo"}
        expected |= {f"{block}.1.DenseReluDense.{x}.weight" for x in ("wi_0", "wi_1", "wo")}
    expected.add("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    assert set(t5.state_dict()) == expected


@pytest.mark.parametrize("distance, bucket", [
    (-200, 15), (-100, 15), (-64, 14), (-32, 12), (-16, 10), (-15, 9), (-9, 8), (-7, 7), (-1, 1),
    (0, 0),
    (1, 17), (7, 23), (8, 24), (12, 25), (16, 26), (32, 28), (64, 30), (100, 31), (200, 31),
])
def test_distances_fall_into_their_buckets(distance, bucket):
    assert relative_position_bucket(torch.tensor([distance])).tolist() == [bucket]


def test_buckets_are_the_exact_integers_of_the_logarithm():
    """In whole numbers: n is in bucket 8 + b from the first n with (n/8)⁸ >= 16ᵇ."""
    for n in range(8, 512):
        expected = 8 + max(b for b in range(8) if n**8 >= 8**8 * 16**b)
        buckets = relative_position_bucket(torch.tensor([-n, n])).tolist()
        assert buckets == [expected, 16 + expected], n


def test_the_bias_looks_up_key_minus_query():
    attention = T5Attention(SMALL, has_relative_attention_bias=True)
    bias = attention.compute_bias(5)
    assert bias.shape == (1, 4, 5, 5)
    table = attention.relative_attention_bias.weight
    assert torch.equal(bias[0, :, 1, 4], table[16 + 3])     # the key is three to the right
    assert torch.equal(bias[0, :, 4, 1], table[3])


def test_scores_are_not_divided_by_the_root_of_the_head_width():
    torch.manual_seed(0)
    attention = T5Attention(SMALL, False)
    x = torch.randn(2, 5, 16)
    bias = torch.randn(1, 4, 5, 5)
    q = attention.q(x).view(2, 5, 4, 6).transpose(1, 2)     # (B, H, L, D)
    k = attention.k(x).view(2, 5, 4, 6).transpose(1, 2)
    v = attention.v(x).view(2, 5, 4, 6).transpose(1, 2)
    out = (q @ k.mT + bias).softmax(-1) @ v
    expected = attention.o(out.transpose(1, 2).reshape(2, 5, 24))
    torch.testing.assert_close(attention(x, bias), expected)


def test_the_norm_subtracts_no_mean_and_rounds_before_its_weight():
    norm = T5LayerNorm(8)
    norm.weight.copy_(torch.linspace(0.5, 2, 8))
    for x in (1e-3 * torch.randn(3, 8), torch.randn(3, 8) + 5):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(norm(x), normed * norm.weight)
    norm, x = norm.bfloat16(), x.bfloat16()
    normed = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), normed.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (normed * norm.weight.float()).bfloat16())


def test_the_feed_forward_is_gated_by_a_tanh_gelu():
    ff, x = T5FF(SMALL), torch.randn(2, 5, 16)
    g = ff.wi_0(x)
    gelu = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    torch.testing.assert_close(ff(x), ff.wo(gelu * ff.wi_1(x)))


def test_padding_is_attended_to(t5):
    short, long = torch.tensor([[5, 6, 1]]), torch.tensor([[5, 6, 1, 0, 0, 0]])
    assert not torch.allclose(t5(short), t5(long)[:, :3], atol=1e-3)


def test_without_the_table_tokens_have_no_order(t5):
    table = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    saved = table.clone()
    ids = torch.tensor([[5, 6, 7, 8, 1]])
    assert not torch.allclose(t5(ids.flip(1)).flip(1), t5(ids), atol=1e-3)
    table.zero_()
    torch.testing.assert_close(t5(ids.flip(1)).flip(1), t5(ids), rtol=1e-5, atol=1e-5)
    table.copy_(saved)


def test_float16_outliers_are_clamped_further_if_one_is_infinite():
    finite = torch.tensor([65504.0, -65504, 3], dtype=torch.float16)
    assert torch.equal(clamp_fp16(finite), finite)
    infinite = torch.tensor([torch.inf, -torch.inf, 65504, 3], dtype=torch.float16)
    assert clamp_fp16(infinite).tolist() == [64512, -64512, 64512, 3]   # 64504 is 64512 in float16
    assert clamp_fp16(infinite.float()).tolist() == [torch.inf, -torch.inf, 65504, 3]


def test_float16_layers_stay_finite():
    x = torch.ones(1, 5, 16).half()
    bias = torch.zeros(1, 4, 5, 5).half()
    attention = T5LayerSelfAttention(SMALL, False).half()
    ff = T5LayerFF(SMALL).half()
    for linear in (
        attention.SelfAttention.v,
        attention.SelfAttention.o,
        ff.DenseReluDense.wi_0,
        ff.DenseReluDense.wi_1,
        ff.DenseReluDense.wo,
    ):
        linear.weight.fill_(100)
    assert torch.equal(attention(x, bias), torch.full_like(x, 64504))
    assert torch.equal(ff(x), torch.full_like(x, 64504))
