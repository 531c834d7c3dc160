"""The linear layer, the GELU and the modulated norm. Oracle: PyTorch's own, in float64."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from miniflux.networks import native
from miniflux.networks.layers import Linear, TanhGELU, tanh_gelu
from miniflux.networks.mmdit import modulate

built = pytest.mark.skipif(native._cpu is None and os.environ.get("MINIFLUX_REQUIRE_NATIVE") != "1",
                           reason="miniflux._cpu is not built: there is no compiler here")


def by_columns(layer: Linear) -> Linear:
    """The same layer, its weight stored by columns, as loading a checkpoint in float32 does."""
    layer.weight.data = layer.weight.data.t().contiguous().t()
    return layer


def error(ours, theirs) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


@built
@pytest.mark.parametrize("K, N", [(64, 192), (7, 16), (33, 48), (768, 192)])
@pytest.mark.parametrize("rows", [(1,), (8,), (2, 13), (1, 96), (2, 3, 4)])
def test_few_rows_times_a_weight_by_columns(rows, K, N):
    torch.manual_seed(0)
    layer, x = by_columns(Linear(K, N)), torch.randn(*rows, K)
    assert native.takes_linear(x, layer.weight, layer.bias)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert layer(x).shape == (*rows, N) and error(layer(x), expected) < 2e-6
    wide = torch.randn(*rows, K + 5)
    wide[..., 3:-2] = x
    assert torch.equal(layer(wide[..., 3:-2]), layer(x))    # rows that are parts of wider ones


@built
def test_no_rows_and_nan():
    layer = by_columns(Linear(8, 16))
    assert layer(torch.empty(0, 8)).shape == (0, 16)
    assert tanh_gelu(torch.empty(0, 8)).shape == (0, 8)
    x = torch.randn(10, 8)
    x[3, 2] = torch.nan
    assert torch.equal(layer(x).isnan().all(1), torch.arange(10) == 3)
    assert not layer(x)[4:].isnan().any()


@built
@pytest.mark.parametrize("what, change", [
    ("stored by rows", lambda x, layer: (x, Linear(32, 64))),
    ("an odd number of columns", lambda x, layer: (x, by_columns(Linear(32, 60)))),
    ("a large weight", lambda x, layer: (x, by_columns(Linear(32, 32768)))),
    ("bfloat16", lambda x, layer: (x.bfloat16(), layer.bfloat16())),
    ("no bias", lambda x, layer: (x, by_columns(Linear(32, 64, bias=False)))),
    ("without data", lambda x, layer: (x.to("meta"), layer.to("meta"))),
])
def test_everything_else_is_pytorchs(what, change):
    x, layer = change(torch.randn(5, 32), by_columns(Linear(32, 64)))
    assert not native.takes_linear(x, layer.weight, layer.bias)
    y = layer(x)
    assert y.is_meta or torch.equal(y, F.linear(x, layer.weight, layer.bias))


def test_gradients_and_compiled_graphs_are_pytorchs():
    layer, x = by_columns(Linear(32, 64)), torch.randn(5, 32)
    compiled = torch.compile(lambda x: tanh_gelu(layer(x)), fullgraph=True, backend="aot_eager")
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
    torch.testing.assert_close(compiled(x), expected)
    with torch.enable_grad():
        tanh_gelu(layer(x)).sum().backward()
    assert layer.weight.grad is not None


def test_the_gelu_is_pytorchs_with_the_tanh_formula():
    extremes = torch.tensor([0, -1e-30, 1e4, -1e4, 3e38, -3e38])
    x = torch.cat([torch.linspace(-12, 12, 4001), extremes]).view(1, -1)
    assert (TanhGELU()(x) - F.gelu(x.double(), approximate="tanh")).abs().max() < 1e-6
    for part in (x[:, ::3], x[:, 5:-2], x.expand(3, -1)[:, 1:9]):
        assert torch.equal(tanh_gelu(part), tanh_gelu(part.contiguous()))
    assert tanh_gelu(torch.tensor([[torch.nan, torch.inf]])).tolist()[0][1] == torch.inf
    assert tanh_gelu(torch.tensor([torch.nan])).isnan()


def test_the_modulated_norm_is_layer_norm_times_one_plus_scale_plus_shift():
    torch.manual_seed(0)
    x = 3 + torch.randn(3, 5, 33)                           # no size is a round number
    parts = torch.randn(3, 1, 6 * 33).chunk(6, dim=-1)      # as the modulation gives them

    def by_hand(x, shift, scale):
        x, shift, scale = x.double(), shift.double(), scale.double()
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return (1 + scale) * centred / (variance + 1e-6).sqrt() + shift

    for shift, scale in ((parts[0], parts[1]), (parts[4].contiguous(), parts[3])):
        assert error(modulate(x, shift, scale), by_hand(x, shift, scale)) < 1e-6
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(modulate(transposed, *parts[:2]), modulate(x, *parts[:2]))
    for_each_token = torch.randn(2, 3, 5, 33)               # PyTorch's way takes these too
    assert error(modulate(x, *for_each_token), by_hand(x, *for_each_token)) < 1e-6
    one = parts[0][:1], parts[1][:1]                        # one image's modulation for all
    assert error(modulate(x, *one), by_hand(x, *one)) < 1e-6
    constant, shift, scale = torch.full((1, 2, 8), 5.0), torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    assert modulate(constant, shift, scale).eq(1).all()     # only the shift is left


# ----------------------------------------------------------- where a kernel must not be called


def tiny_layers(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    y = tanh_gelu(layer(x))
    return modulate(y, y[:, :1], y[:, 1:2])


def frozen() -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(0)
    return by_columns(Linear(32, 64)).requires_grad_(False), torch.randn(2, 5, 32)


def test_the_same_bits_with_and_without_no_grad_where_nothing_requires_gradients():
    layer, x = frozen()
    with torch.enable_grad():
        result = tiny_layers(layer, x)
    assert torch.equal(result, tiny_layers(layer, x))


def test_transforms_traces_and_modes_see_every_operation():
    layer, x = frozen()
    expected = tiny_layers(layer, x)
    call = partial(tiny_layers, layer)
    torch.testing.assert_close(torch.vmap(call)(x[None])[0], expected)
    traced = torch.jit.trace(lambda x: call(x), x)        # a kernel would leave empty memory there
    torch.testing.assert_close(traced(2 * x), tiny_layers(layer, 2 * x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(call(x), FakeTensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_forward_mode_derivatives_are_not_lost():
    layer, x = frozen()
    call, direction = partial(tiny_layers, layer), torch.randn_like(x)
    _, derivative = torch.func.jvp(call, (x,), (direction,))
    step = 1e-3 * direction
    expected = (call(x + step) - call(x - step)) / 2e-3
    torch.testing.assert_close(derivative, expected, rtol=1e-2, atol=1e-2)
    with forward_ad.dual_level():
        out = call(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, derivative)


def test_several_threads_at_once_compute_what_one_computes():
    layer, x = frozen()
    inputs = [i * x for i in range(1, 9)]
    expected = [tiny_layers(layer, x) for x in inputs]

    def repeat(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [tiny_layers(layer, x) for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        for results, wanted in zip(threads.map(repeat, inputs), expected):
            assert all(torch.equal(result, wanted) for result in results)


@built
def test_the_binding_refuses_what_cannot_be_an_address():
    for address in (0, 3):
        with pytest.raises(ValueError, match="must not be null, and must be multiples"):
            native._cpu.gelu_float32(1, 4, 4, address, address)
    with pytest.raises(ValueError, match="multiple of 16 channels"):
        native._cpu.linear_float32((1, 4, 20), 64, 64, 64, 64)
    with pytest.raises(ValueError, match="must not be negative"):
        native._cpu.modulate_float32((1, -2, 4, 4), 64, 64, 64, 64)
