"""Previews. Oracles: least squares by numpy; diffusers' `AutoencoderTiny` with the same random weights; the shipped tiny model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from reference import randomise, small_pipeline
from safetensors.torch import load_file, save_file

from miniflux import cli, flags, generate, load
from miniflux.checkpoints.vision import load_taef1
from miniflux.imaging.images import preprocess
from miniflux.imaging.preview import fit_preview, linear_preview, load_preview
from miniflux.imaging.preview import main as command
from miniflux.latents import encode
from miniflux.networks.taef1 import TAEF1Decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("preview") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


def photo(seed: int) -> Image.Image:
    grain = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(grain).resize((32, 32), Image.Resampling.BICUBIC)


def test_the_map_is_the_least_squares_solution(flux):
    pictures = [photo(seed) for seed in range(6)]
    pixels = preprocess(pictures, 32, 32)
    x = encode(flux, pixels).permute(0, 2, 3, 1).reshape(-1, 16).numpy()
    y = (F.avg_pool2d(pixels, 8) / 2 + 0.5).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    expected = np.linalg.lstsq(np.c_[x, np.ones(len(x))].astype(np.float64), y.astype(np.float64), rcond=None)[0].T
    table = fit_preview(flux, pictures)
    assert table.shape == (3, 17) and np.abs(table.numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    flat = linear_preview(table, torch.full((1, 16, 4, 4), 0.1))
    assert flat.shape == (1, 3, 32, 32) and np.abs(flat[0, :, 9, 9].numpy() - (expected[:, :16].sum(1) * 0.1 + expected[:, 16]).clip(0, 1)).max() < 1e-5


def test_one_flat_picture_is_enough_for_its_own_colour(flux):
    picture = Image.new("RGB", (32, 32), (200, 100, 50))
    seen = linear_preview(fit_preview(flux, picture), encode(flux, preprocess([picture], 32, 32)))
    assert (seen.mean((2, 3)) * 255 - torch.tensor([200.0, 100, 50])).abs().max() < 3


def test_the_tiny_models_previews_have_its_colours():
    """Fitted on eight pictures; of what differs within and between four others it explains (measured) 87%."""
    flux = load(device="cpu")
    seen = [f"{thing} on a {colour} background" for thing, colour in zip(
        ("a red apple", "a fox", "a small cat", "an owl", "a rocket", "a tree", "a boat", "a pencil"),
        ("blue", "green", "pink", "yellow", "white", "purple", "orange", "black"))]
    unseen = ["two owls at night", "a boat in the sea", "a tree on a beach", "a fox on a red background"]
    pictures = generate(flux, seen + unseen, steps=8, progress=False)
    pixels = preprocess(pictures[8:], 128, 128)
    wanted = F.avg_pool2d(pixels / 2 + 0.5, 8)
    found = F.avg_pool2d(linear_preview(fit_preview(flux, pictures[:8]), encode(flux, pixels)), 8)
    assert (found - wanted).square().sum() < 0.25 * (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()


@pytest.fixture(scope="module")
def taef1(tmp_path_factory):
    theirs = randomise(AutoencoderTiny(latent_channels=16), seed=11)
    theirs.save_pretrained(path := tmp_path_factory.mktemp("taef1"))
    return path, theirs


def test_taef1_decodes_as_in_diffusers_from_its_folder_and_from_the_original_file(taef1, tmp_path):
    path, theirs = taef1
    z = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    expected, ours = theirs.decode(z).sample / 2 + 0.5, load_taef1(path)(z)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    original = {".".join([str(int(number) + 1), *rest]): tensor for name, tensor in state.items() if name.startswith("decoder.")
                for number, *rest in [name.removeprefix("decoder.layers.").split(".")]}
    save_file(original, tmp_path / "taef1_decoder.safetensors")
    assert "1.weight" in original and torch.equal(load_taef1(tmp_path / "taef1_decoder.safetensors")(z), ours)


def test_the_official_decoder_has_1229443_parameters():
    theirs = AutoencoderTiny(latent_channels=16).decoder
    assert [sum(p.numel() for p in net.parameters()) for net in (TAEF1Decoder(), theirs)] == [1_229_443] * 2


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["preview", *map(str, arguments)])
    command()


def test_the_command_fits_a_map_that_previews_use(folder, flux, taef1, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        photo(seed).save(f"{seed}.png")
    run(monkeypatch, "0.png", "1.png", "2.png", "--model", folder, "--device", "cpu")
    assert capsys.readouterr().out == "preview.safetensors\n" and not list(tmp_path.glob(".*"))
    assert torch.equal(load_file("preview.safetensors")["preview"], fit_preview(flux, ["0.png", "1.png", "2.png"]))
    for source in ("preview.safetensors", taef1[0]):
        decodes: list = []
        states: list = []
        with monkeypatch.context() as patch:
            patch.setattr("miniflux.cli.decode", lambda flux, z, seen=decodes: seen.append(z))
            cli.run(flags.parser("generate", ""), generate, argv=["owl", "--model", str(folder), "--device", "cpu", "--steps", "3", "--width", "32", "--height",
                    "32", "--max-text-tokens", "8", "--quiet", "--preview-with", str(source), "--output", "owl.png"])
        generate(flux, "owl", width=32, height=32, steps=3, max_text_tokens=8, progress=False, on_step=lambda step, t, x, seen=states: seen.append((t, x)))
        expected = cli.estimates(states, load_preview(source, flux), None)
        with Image.open("owl-preview.png") as strip:
            assert strip.size == (96, 32) and not decodes
            assert strip.crop((32, 0, 64, 32)).tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("tensors, sentence", [
    ({"preview": torch.ones(3, 5)}, "maps 4 latent channels, the model has 16: fit one with it"),
    ({"preview": torch.ones(17)}, r"holds a torch.float32 of the shape \[17\], expected a map"),
    ({"preview": torch.full((3, 17), torch.nan)}, "expected a map"),
    ({"x": torch.ones(1)}, "is neither a preview map nor TAEF1's decoder"),
    ({"decoder.layers.0.weight": torch.ones(64, 16, 3, 3)}, "is not a TAEF1Decoder of these sizes: missing"),
])
def test_what_makes_no_previews_is_refused(flux, tmp_path, tensors, sentence):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=sentence):
        load_preview(tmp_path / "a.safetensors", flux)


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere.png"], "the image nowhere.png does not exist"),
    (["0.png", "--output", "map.png"], "must end in .safetensors"),
    ([], "the following arguments are required: images"),
])
def test_a_mistake_ends_in_one_line(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments, "--model", folder)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
