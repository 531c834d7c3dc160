"""The command: what it writes, what it says, how it fails. Oracle: by hand. Run in this process, but for the cold one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniflux import add_lora, bench, cli, generate, load, quantize


@pytest.fixture(scope="module")
def folder(small_folder) -> str:
    return str(small_folder)


def run(folder: str, *arguments: str) -> None:
    cli.run(cli.parser("generate", ""), generate, argv=["a red apple", "--model", folder, "--device", "cpu", "--width", "32", "--height", "48",
                                                    "--max-text-tokens", "8", *arguments])


def test_the_picture_is_the_functions_and_carries_its_making(folder, tmp_path, capsys):
    path = tmp_path / "apple.png"
    run(folder, "--steps", "2", "--seed", "7", "--output", str(path), "--quiet")
    expected, = generate(load(folder, device="cpu"), "a red apple", width=32, height=48, steps=2, seed=7, max_text_tokens=8)
    with Image.open(path) as picture:
        assert picture.tobytes() == expected.tobytes()
        assert picture.text["prompt"] == "a red apple" and picture.text["seed"] == "7" and picture.text["steps"] == "2"
        assert {"guidance", "model", "version"} <= set(picture.text)
    assert capsys.readouterr().out == f"{path}\n" and list(tmp_path.iterdir()) == [path]


def test_several_pictures_are_numbered_and_count_the_seed_up(folder, tmp_path):
    run(folder, "--steps", "1", "--num-images", "2", "--seed", "3", "--output", str(tmp_path / "a.png"), "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png"]
    with Image.open(tmp_path / "a-2.png") as picture:
        assert picture.text["seed"] == "4"


def test_preview_is_a_strip_that_ends_in_the_picture(folder, tmp_path):
    """The last step's estimate x - t·v is where the Euler step lands."""
    run(folder, "--steps", "3", "--preview", "--output", str(tmp_path / "a.png"), "--quiet")
    with Image.open(tmp_path / "a.png") as picture, Image.open(tmp_path / "a-preview.png") as strip:
        assert strip.size == (3 * 32, 48)
        last = strip.crop((64, 0, 96, 48))
        assert max(abs(a - b) for a, b in zip(last.tobytes(), picture.tobytes())) <= 1


def test_loras_are_added_and_written_down(folder, tmp_path):
    from safetensors.torch import save_file
    for name, factor in (("a", 0.3), ("b", 0.2)):
        save_file({"diffusion_model.txt_in.lora_A.weight": torch.full((2, 32), factor), "diffusion_model.txt_in.lora_B.weight":
                   torch.full((48, 2), factor)}, tmp_path / f"{name}.safetensors")
    run(folder, "--steps", "1", "--lora", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--lora-scales", "0.5", "2",
        "--output", str(tmp_path / "a.png"), "--quiet")
    flux = add_lora(add_lora(load(folder, device="cpu"), tmp_path / "a.safetensors", 0.5), tmp_path / "b.safetensors", 2.0)
    expected, = generate(flux, "a red apple", width=32, height=48, steps=1, max_text_tokens=8)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.tobytes() == expected.tobytes() and picture.text["lora"].endswith("b.safetensors 2")


def test_a_model_is_quantised(folder, tmp_path):
    run(folder, "--steps", "1", "--quantize", "int8", "--output", str(tmp_path / "a.png"), "--quiet")
    expected, = generate(quantize(load(folder, device="cpu"), "int8"), "a red apple", width=32, height=48, steps=1, max_text_tokens=8)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize("more", [[], ["--offload", "model"]], ids=str)
def test_a_schedule_can_be_asked_for(folder, tmp_path, more):
    """As the keyword of `load`."""
    arguments = ["--steps", "2", "--schedule", "schnell", *more]
    run(folder, *arguments, "--output", str(tmp_path / "a.png"), "--quiet")
    flux = load(folder, device="cpu", schedule="schnell")
    expected, = generate(flux, "a red apple", width=32, height=48, steps=2, max_text_tokens=8)
    with Image.open(tmp_path / "a.png") as picture:
        assert max(abs(a - b) for a, b in zip(picture.tobytes(), expected.tobytes())) <= 1


@pytest.mark.parametrize("mode", ["block", "disk"])
def test_an_offloaded_model_paints_the_same_with_its_loras(folder, tmp_path, mode):
    from safetensors.torch import save_file
    save_file({"diffusion_model.txt_in.lora_A.weight": torch.full((2, 32), 0.3), "diffusion_model.txt_in.lora_B.weight":
               torch.full((48, 2), 0.3)}, tmp_path / "a.safetensors")
    run(folder, "--steps", "1", "--offload", mode, "--lora", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "a.png"), "--quiet")
    flux = add_lora(load(folder, device="cpu"), tmp_path / "a.safetensors")
    expected, = generate(flux, "a red apple", width=32, height=48, steps=1, max_text_tokens=8)
    with Image.open(tmp_path / "a.png") as picture:
        assert max(abs(a - b) for a, b in zip(picture.tobytes(), expected.tobytes())) <= 1


@pytest.mark.parametrize("arguments, sentence", [
    (["--lora", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    (["--lora-scales", "0.5"], "there are 1 scales for 0 LoRAs: give one for each"),
    (["--width", "8"], "width is 8: expected a whole number of pixels from 16"),
    (["--width", "wide"], "argument --width: invalid int value: 'wide'"),
    (["--steps", "0"], "steps is 0"),
    (["--seed", "-5"], "seed is -5"),
    (["--guidance", "nan"], "guidance is nan"),
    (["--max-text-tokens", "9999"], "max_text_tokens is 9999"),
    (["--output", "/nowhere/at/all.png"], "/nowhere/at/all.png cannot be written"),
    (["--output", "picture.txt"], "must end in .png"),
    (["--model", "no-such-model"], "'no-such-model' is neither a folder nor a known model"),
    (["--device", "abacus"], "the device 'abacus' cannot be used here"),
    (["--transformer", "missing.safetensors"], "missing.safetensors does not exist"),
    (["--num-images", "0"], "num_images is 0"),
    (["--num-images", "1000000000000"], "num_images is 1000000000000"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(folder, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())                                         # nothing half-written remains


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.parser("generate", "").parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--steps", "--guidance", "--seed", "--width", "--sigmas", "--dtype", "--preview", "--quiet"):
        assert "(default" in text.split(f"{flag} ")[-1][:200], flag


def test_list_models_needs_no_prompt_and_names_the_official_ones(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        cli.parser("generate", "").parse_args(["--list-models"])
    out = capsys.readouterr().out
    assert not stop.value.code and "black-forest-labs/FLUX.1-schnell: not in" in out


def test_the_command_runs_without_a_warning(folder, tmp_path):
    """In a fresh process, with warnings as errors, and no progress bar where stderr is no terminal."""
    command = [sys.executable, "-W", "error", "-m", "miniflux.generate", "an owl", "--model", folder, "--steps", "1", "--width", "16",
               "--height", "16", "--output", "owl.png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and Path(tmp_path / "owl.png").is_file()


def test_a_benchmark_without_the_libraries_it_compares_with_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["bench", "lora", "offload", "int8"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "offload, int8 compare with diffusers: `pip install diffusers transformers`, or name other tables" in error
