"""The autoencoder against oracles by hand: official counts and names, and convolutions simple enough to foresee."""

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
    assert count(official) == 83_819_683 and len(official.state_dict()) == 244
    assert count(official.encoder) == 34_274_208 and count(official.decoder) == 49_545_475


def test_the_tensors_are_named_as_in_the_official_file(official):
    def linear(name):
        return {name + ".weight", name + ".bias"}

    def block(name, has_shortcut):
        parts = ("norm1", "conv1", "norm2", "conv2") + ("nin_shortcut",) * has_shortcut
        return set().union(*(linear(f"{name}.{part}") for part in parts))

    expected = set()
    for half in ("encoder", "decoder"):
        for name in ("conv_in", "norm_out", "conv_out", *(f"mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out"))):
            expected |= linear(f"{half}.{name}")
        expected |= block(f"{half}.mid.block_1", False) | block(f"{half}.mid.block_2", False)
    for i in range(4):
        for j in range(2):
            expected |= block(f"encoder.down.{i}.block.{j}", j == 0 and i in (1, 2))
        for j in range(3):
            expected |= block(f"decoder.up.{i}.block.{j}", j == 0 and i in (0, 1))
        expected |= linear(f"encoder.down.{i}.downsample.conv") if i < 3 else set()
        expected |= linear(f"decoder.up.{i}.upsample.conv") if i > 0 else set()
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
    assert up(torch.tensor([[[[1.0, 2], [3, 4]]]])).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]]


def test_the_attention_has_one_head_over_all_pixels_and_a_residual():
    block = AttnBlock(8, 4)
    x = torch.randn(2, 8, 3, 5)
    h = F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-6).flatten(2).transpose(1, 2)  # (B, h·w, C)
    q, k, v = (F.linear(h, f.weight[:, :, 0, 0], f.bias) for f in (block.q, block.k, block.v))
    out = F.linear(formula(q, k, v), block.proj_out.weight[:, :, 0, 0], block.proj_out.bias)
    torch.testing.assert_close(block(x), x + out.transpose(1, 2).view(2, 8, 3, 5))


@pytest.mark.parametrize("width", [8, 12])
def test_a_residual_block_has_a_shortcut_only_where_the_width_changes(width):
    block = ResnetBlock(8, width, 4)
    assert hasattr(block, "nin_shortcut") == (width != 8)
    x = torch.randn(2, 8, 3, 5)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)))
    torch.testing.assert_close(block(x), h + (block.nin_shortcut(x) if width != 8 else x))


def test_latents_are_shifted_then_scaled_and_pictures_undo_it():
    net = Autoencoder(SMALL)
    net.encoder.conv_out.weight.zero_()
    net.encoder.conv_out.bias.copy_(torch.arange(32.0))                         # mean 0..15, log-variance 16..31
    z = net.encode(torch.randn(1, 3, 8, 8)).flatten()
    torch.testing.assert_close(z, (torch.arange(16.0) - 0.1159) * 0.3611)
    net.decoder = torch.nn.Identity()
    torch.testing.assert_close(net.decode(z), torch.arange(16.0))


def test_encoding_draws_no_random_numbers():
    net, picture = Autoencoder(SMALL), torch.randn(1, 3, 16, 16)
    before = torch.get_rng_state()
    assert torch.equal(net.encode(picture), net.encode(picture))
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_the_first_half_of_a_residual_block_is_gone_during_the_second():
    block, seen, alive = ResnetBlock(8, 8, 4), [], []
    block.conv1.register_forward_hook(lambda _, inputs, output: seen.append(weakref.ref(output)))
    block.conv2.register_forward_pre_hook(lambda *_: alive.append(seen[0]() is not None))
    block(torch.randn(1, 8, 3, 5))
    assert alive == [False]


@torch.no_grad()
@pytest.mark.parametrize("half, shape, before, last", [("encoder", (1, 3, 16, 16), "down.0.downsample", "down.1.downsample"),
                                                       ("decoder", (1, 16, 2, 2), "up.1.upsample", "up.0.block.1")])
def test_what_a_level_was_given_is_gone_when_its_last_block_runs(half, shape, before, last):
    net, seen, alive = getattr(Autoencoder(SMALL), half), [], []
    net.get_submodule(before).register_forward_hook(lambda _, inputs, output: seen.append(weakref.ref(output)))
    net.get_submodule(last).register_forward_pre_hook(lambda *_: alive.append(seen[0]() is not None))
    net(torch.randn(shape))
    assert alive == [False]
