"""Tiles. Oracles: diffusers' tiled and sliced autoencoder with the same random weights; by hand;
the plain model."""

from dataclasses import replace

import pytest
import torch
from reference import vae

from miniflux import generate, load
from miniflux.checkpoints.layouts import load_autoencoder
from miniflux.engine.tiling import blend, in_tiles, tile


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model and theirs: a small autoencoder, widths that differ."""
    folder = tmp_path_factory.mktemp("vae")
    theirs = vae()
    theirs.save_pretrained(folder)
    ours = load_autoencoder(folder, torch.device("cpu"), torch.float32)
    return replace(load(device="cpu"), autoencoder=ours), theirs


def tiled(pair, size):
    flux, theirs = pair
    theirs.tile_sample_min_size = size
    theirs.tile_latent_min_size = size // 8
    theirs.enable_tiling()
    theirs.enable_slicing()
    return tile(flux, size).autoencoder, theirs


def relative(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("h, w", [(8, 8), (4, 9), (11, 5), (13, 17), (8, 30), (25, 3)])
def test_decoding_in_tiles_equals_diffusers(pair, size, h, w):
    ours, theirs = tiled(pair, size)
    z = torch.randn(2, 16, h, w, generator=torch.Generator().manual_seed(h))
    expected = theirs.decode(z / ours.config.scale_factor + ours.config.shift_factor).sample
    assert relative(ours.decode(z), expected) < 1e-5


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("h, w", [(64, 64), (33, 72), (88, 40), (104, 136), (61, 117), (200, 24)])
def test_encoding_in_tiles_equals_diffusers(pair, size, h, w):
    """Also images whose sides are no multiples of 8."""
    ours, theirs = tiled(pair, size)
    image = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(w)) * 2 - 1
    mean = theirs.encode(image).latent_dist.mean
    expected = (mean - ours.config.shift_factor) * ours.config.scale_factor
    assert relative(ours.encode(image), expected) < 1e-5


def test_one_image_at_a_time_equals_diffusers_slices_and_the_batch(pair):
    flux, theirs = pair
    z = torch.randn(3, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    sizes = []

    def look(module, inputs, output):
        sizes.append(tuple(inputs[0].shape))

    handle = flux.autoencoder.decoder.conv_in.register_forward_hook(look)
    sliced = tile(flux, 64).autoencoder.decode(z)
    handle.remove()
    assert sizes == [(1, 16, 6, 4)] * 3
    theirs.disable_tiling()
    theirs.enable_slicing()
    assert relative(sliced, theirs.decode(z / 0.3611 + 0.1159).sample) < 1e-5
    assert relative(sliced, flux.autoencoder.decode(z)) < 1e-5


def test_an_image_not_larger_than_a_tile_is_the_plain_one_bit_for_bit():
    """128 pixels, the size of the shipped model's images; its tiles are as large.
    A wider one differs, a little."""
    flux = load(device="cpu")
    tiled_flux = tile(flux)
    keywords = dict(steps=1, output="tensor", progress=False)
    expected = generate(flux, "an owl", **keywords)
    assert torch.equal(generate(tiled_flux, "an owl", **keywords), expected)

    wide = generate(tiled_flux, "an owl", width=208, **keywords)
    plain = generate(flux, "an owl", width=208, **keywords)
    assert wide.shape == plain.shape == (1, 3, 128, 208)
    assert 0 < (wide - plain).abs().mean() < 0.05


def test_where_each_place_keeps_its_value_tiles_are_the_whole(pair):
    """A network that only enlarges: every tile agrees with its neighbours, whatever the sizes."""
    def enlarge(x):
        return torch.nn.functional.interpolate(x, scale_factor=4.0, mode="nearest")

    for h, w in ((9, 21), (8, 8), (17, 30), (1, 40)):
        x = torch.randn(1, 2, h, w)
        assert torch.allclose(in_tiles(enlarge, x, 8, lambda n: 4 * n), enlarge(x), atol=1e-6)


def test_a_tile_emerges_evenly_from_the_one_before():
    left, right = torch.zeros(1, 1, 2, 6), torch.ones(1, 1, 2, 6)
    blend(left, right, 4, dim=3)
    assert right[0, 0].tolist() == [[0, 0.25, 0.5, 0.75, 1, 1]] * 2


def test_the_given_model_stays_as_it_is(pair):
    flux, _ = pair
    before = dict(vars(flux.autoencoder.decoder))
    copied = tile(flux, 32).autoencoder
    assert vars(flux.autoencoder.decoder) == before
    assert type(copied) is type(flux.autoencoder)
    for a, b in zip(copied.parameters(), flux.autoencoder.parameters(), strict=True):
        assert a is b


@pytest.mark.parametrize("size", [0, -32, 33, 48, 64.0, "64"])
def test_a_wrong_size_gets_one_sentence(pair, size):
    with pytest.raises(ValueError, match="expected a multiple of 32 pixels"):
        tile(pair[0], size)


def test_a_model_without_autoencoder_gets_one_sentence(pair):
    with pytest.raises(ValueError, match="without an autoencoder"):
        tile(replace(pair[0], autoencoder=None))
