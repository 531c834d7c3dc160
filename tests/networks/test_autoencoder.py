"""The autoencoder.

Oracles by hand: official counts and names; convolutions simple enough to compute in the head."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from miniflux.networks.attention import formula
from miniflux.networks.autoencoder import (
    AttnBlock,
    Autoencoder,
    AutoencoderConfig,
    Downsample,
    ResnetBlock,
    Upsample,
)

SMALL = AutoencoderConfig(ch=8, ch_mult=(1, 2, 2, 2), num_res_blocks=1, num_groups=4)


@pytest.fixture(scope="module")
def official() -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_official_sizes_have_the_official_number_of_parameters(official):
    assert count(official) == 83_819_683
    assert count(official.encoder) == 34_274_208
    assert count(official.decoder) == 49_545_475
    assert len(official.state_dict()) == 244


def test_the_tensors_are_named_as_in_the_official_file(official):
    def linear(name):
        return {name + ".weight", name + ".bias"}

    def linears(prefix, names):
        return set().union(*(linear(f"{prefix}.{name}") for name in names))

    def block(name, has_shortcut):
        parts = ["norm1", "conv1", "norm2", "conv2"]
        if has_shortcut:
            parts.append("nin_shortcut")
        return linears(name, parts)

    expected = set()
    for half in ("encoder", "decoder"):
        expected |= linears(half, ("conv_in", "norm_out", "conv_out"))
        expected |= linears(f"{half}.mid.attn_1", ("norm", "q", "k", "v", "proj_out"))
        expected |= block(f"{half}.mid.block_1", False)
        expected |= block(f"{half}.mid.block_2", False)
    for i in range(4):
        for j in range(2):
            expected |= block(f"encoder.down.{i}.block.{j}", j == 0 and i in (1, 2))
        for j in range(3):
            expected |= block(f"decoder.up.{i}.block.{j}", j == 0 and i in (0, 1))
        if i < 3:
            expected |= linear(f"encoder.down.{i}.downsample.conv")
        if i > 0:
            expected |= linear(f"decoder.up.{i}.upsample.conv")
    assert set(official.state_dict()) == expected


def test_the_decoder_runs_through_its_levels_backwards(official):
    shapes = {name: tuple(p.shape) for name, p in official.named_parameters()}
    assert shapes["decoder.conv_in.weight"] == (512, 16, 3, 3)
    assert shapes["decoder.up.3.block.0.conv1.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.1.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["decoder.conv_out.weight"] == (3, 128, 3, 3)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)


def test_one_latent_pixel_stands_for_eight_by_eight():
    assert AutoencoderConfig().downscale == 8
    net = Autoencoder(SMALL)
    assert net.encode(torch.randn(2, 3, 24, 40)).shape == (2, 16, 3, 5)
    assert net.decode(torch.randn(2, 16, 3, 5)).shape == (2, 3, 24, 40)


def test_downsampling_pads_below_and_to_the_right_only():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    down = Downsample(1)
    down.conv.bias.zero_()
    down.conv.weight.zero_()
    down.conv.weight[0, 0, 0, 0] = 1                    # the kernel's upper left corner
    assert down(x).tolist() == [[[[1, 3], [9, 11]]]]
    down.conv.weight.zero_()
    down.conv.weight[0, 0, 2, 2] = 1                    # its lower right corner
    assert down(x).tolist() == [[[[11, 0], [0, 0]]]]


def test_upsampling_repeats_pixels():
    up = Upsample(1)
    up.conv.bias.zero_()
    up.conv.weight.zero_()
    up.conv.weight[0, 0, 1, 1] = 1
    x = torch.tensor([[[[1.0, 2], [3, 4]]]])
    assert up(x)[0, 0].tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 4, 4],
        [3, 3, 4, 4],
    ]


def test_the_attention_has_one_head_over_all_pixels_and_a_residual():
    block = AttnBlock(8, 4)
    x = torch.randn(2, 8, 3, 5)
    h = F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-6)
    h = h.flatten(2).transpose(1, 2)                        # (B, h·w, C)

    def linear(conv, x):
        return F.linear(x, conv.weight[:, :, 0, 0], conv.bias)

    out = formula(linear(block.q, h), linear(block.k, h), linear(block.v, h))
    out = linear(block.proj_out, out)
    torch.testing.assert_close(block(x), x + out.transpose(1, 2).view(2, 8, 3, 5))


@pytest.mark.parametrize("width", [8, 12])
def test_a_residual_block_has_a_shortcut_only_where_the_width_changes(width):
    block = ResnetBlock(8, width, 4)
    assert hasattr(block, "nin_shortcut") == (width != 8)
    x = torch.randn(2, 8, 3, 5)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)))
    torch.testing.assert_close(block(x), h + (block.nin_shortcut(x) if width != 8 else x))


def test_encoding_shifts_then_scales_the_latents_and_decoding_undoes_it():
    net = Autoencoder(SMALL)
    net.encoder.conv_out.weight.zero_()
    net.encoder.conv_out.bias.copy_(torch.arange(32.0))     # mean 0..15, log-variance 16..31
    z = net.encode(torch.randn(1, 3, 8, 8)).flatten()
    torch.testing.assert_close(z, (torch.arange(16.0) - 0.1159) * 0.3611)
    net.decoder = torch.nn.Identity()
    torch.testing.assert_close(net.decode(z), torch.arange(16.0))


def test_encoding_draws_no_random_numbers():
    net = Autoencoder(SMALL)
    image = torch.randn(1, 3, 16, 16)
    before = torch.get_rng_state()
    assert torch.equal(net.encode(image), net.encode(image))
    assert torch.equal(torch.get_rng_state(), before)


def is_output_alive(net, first, last, x):
    """Whether the output of the layer `first` is still in memory when the layer `last` runs."""
    outputs, alive = [], []
    first.register_forward_hook(lambda _, inputs, output: outputs.append(weakref.ref(output)))
    last.register_forward_pre_hook(lambda *_: alive.append(outputs[0]() is not None))
    net(x)
    assert len(alive) == 1
    return alive[0]


@torch.no_grad()
def test_the_first_half_of_a_residual_block_is_freed_during_the_second():
    block = ResnetBlock(8, 8, 4)
    assert not is_output_alive(block, block.conv1, block.conv2, torch.randn(1, 8, 3, 5))


@torch.no_grad()
@pytest.mark.parametrize("half, shape, before, last", [
    ("encoder", (1, 3, 16, 16), "down.0.downsample", "down.1.downsample"),
    ("decoder", (1, 16, 2, 2), "up.1.upsample", "up.0.block.1"),
])
def test_the_input_of_a_level_is_freed_when_its_last_block_runs(half, shape, before, last):
    net = getattr(Autoencoder(SMALL), half)
    layers = net.get_submodule(before), net.get_submodule(last)
    assert not is_output_alive(net, *layers, torch.randn(shape))
