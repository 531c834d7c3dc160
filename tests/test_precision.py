"""Float16, whose largest number is 65504: no black images. Oracles: the same weights in float32;
the code without its guards, which must fail where the guarded code does not, or the test would
prove nothing."""

import copy

import pytest
import torch

from miniflux import generate, load
from miniflux.networks import autoencoder, mmdit, t5
from miniflux.networks.autoencoder import Autoencoder, AutoencoderConfig
from miniflux.networks.mmdit import MMDiT, MMDiTConfig
from miniflux.networks.t5 import T5, T5Config
from miniflux.sampling import flow

SIZES = MMDiTConfig(context_in_dim=32, vec_in_dim=24, hidden_size=64, num_heads=2,
                    depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12))


def error(ours, theirs) -> float:
    return float((ours.float() - theirs).norm() / theirs.norm())


def unguarded(monkeypatch, *modules) -> None:
    for module in modules:
        monkeypatch.setattr(module, "clamp_fp16", lambda x: x)


def test_an_image_in_float16_is_that_of_float32_up_to_its_rounding(small_folder):
    def image(dtype):
        flux = load(small_folder, device="cpu", dtype=dtype)
        return generate(flux, "an owl", width=64, height=48, steps=2, max_text_tokens=8,
                        output="tensor", progress=False)

    half = image(torch.float16)
    assert half.dtype == torch.float32
    # Measured: 0.007 and 0.0007; the noise, too, is drawn in float16.
    assert error(half, image(torch.float32)) < 0.03


# -------------------------------------------------------------------------- transformer


def velocity(net: MMDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    like = net.img_in.weight
    txt = torch.randn(1, 5, 32, generator=generator).to(like)
    pooled = torch.randn(1, 24, generator=generator).to(like)
    x = torch.randn(1, 16, 8, 8, generator=generator).to(like)
    return flow(net, txt, pooled, 3.5, 8, 8)(x, 0.7)


@pytest.mark.parametrize("layer, modulation", [
    ("double_blocks.0.txt_mlp.2", "double_blocks.0.txt_mod"),
    ("double_blocks.0.img_mlp.2", "double_blocks.0.img_mod"),
    ("single_blocks.0.linear2", "single_blocks.0.modulation"),
])
def test_a_transformer_whose_tokens_overflow_float16_still_gives_a_velocity(
        layer, modulation, monkeypatch):
    """The layer's result fits into float16, but not its product with the gate."""
    torch.manual_seed(0)
    net = MMDiT(SIZES).requires_grad_(False)
    net.get_submodule(layer).bias.copy_(5e4 * torch.randn(64).sign())
    net.get_submodule(modulation).lin.bias.fill_(3)
    half = copy.deepcopy(net).half()
    assert velocity(net).isfinite().all()
    assert velocity(half).isfinite().all()
    unguarded(monkeypatch, mmdit)
    assert velocity(half).isnan().any()


# ----------------------------------------------------------------------------------- T5


@pytest.fixture
def loud_t5() -> T5:
    """The product of gate and values reaches 10^6, of both signs, as it does in some tokens of
    the official T5; the sums stay small."""
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=50)
    net = T5(config).requires_grad_(False)
    for block in net.encoder.block:
        feed_forward = block.layer[1].DenseReluDense
        feed_forward.wi_0.weight.mul_(1000)
        feed_forward.wi_1.weight.mul_(1000)
        feed_forward.wo.weight.mul_(3e-3)
    return net


def unscaled(layer: t5.T5FF, x: torch.Tensor) -> torch.Tensor:
    """wo(gelu(wi_0 x) · wi_1 x)"""
    gate = torch.nn.functional.gelu(layer.wi_0(x), approximate="tanh")
    return layer.wo(gate * layer.wi_1(x))


def test_t5_whose_products_overflow_float16_gives_what_float32_gives(loud_t5, monkeypatch):
    ids = torch.arange(1, 13)[None]
    expected = loud_t5(ids)
    half = copy.deepcopy(loud_t5).half()
    assert error(half(ids), expected) < 0.01                # measured: 0.001
    unguarded(monkeypatch, t5)
    monkeypatch.setattr(t5.T5FF, "forward", unscaled)
    assert error(loud_t5(ids), expected) == 0
    assert not half(ids).isfinite().all()


def test_t5_in_other_dtypes_is_not_scaled(loud_t5):
    """Bit for bit."""
    layer = loud_t5.encoder.block[0].layer[1].DenseReluDense.bfloat16()
    x = torch.randn(1, 3, 32).bfloat16()
    assert torch.equal(layer(x), unscaled(layer, x))


# -------------------------------------------------------------------------- autoencoder


def test_an_autoencoder_whose_sums_overflow_float16_still_gives_an_image(monkeypatch):
    torch.manual_seed(0)
    config = AutoencoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4)
    net = Autoencoder(config).requires_grad_(False)
    for part in (net.decoder, net.encoder):
        part.mid.block_1.conv2.bias.copy_(6e4 * torch.randn(16).sign())
        part.mid.block_2.conv2.bias.copy_(part.mid.block_1.conv2.bias)          # 1.2·10^5 in sum
    net.decoder.up[1].upsample.conv.weight.mul_(10)         # and from there on still more
    z = torch.randn(1, 16, 4, 4)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    half = copy.deepcopy(net).half()
    assert net.decode(z).isfinite().all()
    assert net.encode(image).isfinite().all()
    assert half.decode(z.half()).isfinite().all()
    assert half.encode(image.half()).isfinite().all()
    unguarded(monkeypatch, autoencoder)
    assert half.decode(z.half()).isnan().any()
    assert half.encode(image.half()).isnan().any()
