"""The command: what it writes, what it says, how it fails. Oracle: by hand. Run in this process, but for the cold one."""

import ast
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from miniflux import add_lora, cli, flags, generate, load, quantize
from miniflux.command import command, in_flags
from miniflux.imaging import saving


@pytest.fixture(scope="module")
def folder(small_folder) -> str:
    return str(small_folder)


def run(folder: str, *arguments: str) -> None:
    cli.run(flags.parser("generate", ""), generate, argv=["a red apple", "--model", folder, "--device", "cpu", "--width", "32", "--height", "48",
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
    (["--lora-scales", "0.5"], "--lora-scales without a LoRA: name one by --lora"),
    (["--width", "8"], "width is 8: expected a whole number of pixels from 16"),
    (["--width", "wide"], "argument --width: invalid int value: 'wide'"),
    (["--steps", "0"], "steps is 0"),
    (["--seed", "-5"], "argument --seed: '-5' is no seed: expected a whole number"),
    (["--seed", "random"], "'random' is no seed: expected a whole number"),
    (["--guidance", "nan"], "guidance is nan"),
    (["--max-text-tokens", "9999"], "--max-text-tokens is 9999"),
    (["--output", "/nowhere/at/all.png"], "/nowhere/at/all.png cannot be written"),
    (["--output", "picture.txt"], "must end in .png"),
    (["--output", "."], "the output . is a folder: expected the name of a file in it"),
    (["--output", "nowhere/a.png"], "the folder nowhere does not exist; create it first"),
    (["--steps", "2", "--sigmas", "1.0"], "--steps is 2, but there are 1 sigmas"),
    (["--batch", "0"], "--batch is 0"),
    (["--num_images", "2"], "there is no flag --num_images: did you mean --num-images?"),
    (["-o", "a.png"], "there is no flag -o: did you mean --output?"),
    (["--stepz", "2"], "there is no flag --stepz: did you mean --steps?"),
    (["--step", "2"], "there is no flag --step: did you mean --steps?"),
    (["--image", "a.png"], "generate takes no --image: that is a flag of image_to_image"),
    (["an owl"], "unexpected arguments: an owl; text of several words needs quotes"),
    (["--watermark"], "32 x 48 pixels have no room for the watermark's 46 bits"),
    (["--width", "16384", "--output", "a.webp"], "a .webp holds at most 16383 pixels a side"),
    (["--model", "no-such-model"], "'no-such-model' is neither a folder nor a known model"),
    (["--device", "abacus"], "the device 'abacus' cannot be used here"),
    (["--transformer", "missing.safetensors"], "missing.safetensors does not exist"),
    (["--num-images", "0"], "--num-images is 0"),
    (["--num-images", "1000000000000"], "--num-images is 1000000000000"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(folder, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())                                         # nothing half-written remains


# ------------------------------------------------------------- what is finished is never thrown away


def test_a_name_that_the_console_cannot_print_costs_no_image(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed := io.BytesIO(), encoding="cp1252"))
    run(folder, "--steps", "1", "--num-images", "3", "--output", str(tmp_path / "狐.png"), "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["狐-1.png", "狐-2.png", "狐-3.png"]
    assert printed.getvalue().count(b"\\u72d0") == 3


@pytest.mark.parametrize("stdout", ["nobody reads it", "closed", None])
def test_an_output_that_nobody_reads_costs_no_image(folder, tmp_path, monkeypatch, stdout):
    """As in `... | head -1`: the first print after the reader has gone raises BrokenPipeError."""
    if stdout:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
        if stdout == "closed":
            os.close(writer)
            stream = io.StringIO()
            stream.close()
        monkeypatch.setattr("sys.stdout", stream)
    else:
        monkeypatch.setattr("sys.stdout", None)
    run(folder, "--steps", "1", "--num-images", "2", "--output", str(tmp_path / "a.png"), "--quiet")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("reason", ["disk", "metadata"])
def test_one_image_that_cannot_be_written_is_put_elsewhere_and_costs_no_other(folder, tmp_path, monkeypatch, capsys, reason):
    written, temporary = tmp_path / "written", tmp_path / "temporary"
    written.mkdir(), temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    save = saving.save

    def fail_once(picture, path, metadata, exif=None):
        if path.name == "a-2.png" and path.parent == written and (reason == "disk" or metadata):
            raise OSError(f"{path} cannot be written: No space left on device") if reason == "disk" else RuntimeError("broken")
        save(picture, path, metadata, exif)

    monkeypatch.setattr(saving, "save", fail_once)
    with pytest.raises(SystemExit) as stop:
        run(folder, "--steps", "1", "--num-images", "3", "--output", str(written / "a.png"), "--quiet")
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and len(said.out.split()) == 3
    if reason == "disk":
        assert {path.name for path in written.iterdir()} == {"a-1.png", "a-3.png"} and len(list(temporary.rglob("a-2.png"))) == 1
        assert "a-2.png cannot be written: No space left on device; the image is in" in said.err
    else:
        assert len(list(written.iterdir())) == 3 and "broken; the image is written without its metadata" in said.err


def test_a_failing_preview_costs_no_image(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "estimates", lambda *_: raise_out_of_memory())
    with pytest.raises(SystemExit) as stop:
        run(folder, "--steps", "2", "--preview", "--num-images", "2", "--output", str(tmp_path / "a.png"), "--quiet")
    assert stop.value.code == 2 and "the preview" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png"]


def raise_out_of_memory():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 137438953472 bytes.")


def test_a_full_disk_is_found_before_the_first_step(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 32 * 48 - 1))
    with pytest.raises(SystemExit):
        run(folder, "--steps", "1000", "--output", str(tmp_path / "a.png"), "--quiet")
    assert "a.png cannot be written: 0 MiB are free on the disk" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nobody can write a file, not even root")
def test_a_folder_in_which_nothing_can_be_written_is_found_before_the_first_step(folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, "--steps", "1000", "--output", "/proc/x.png", "--quiet")
    assert "/proc/x.png cannot be written: No such file or directory" in capsys.readouterr().err


def test_images_painted_at_once_are_those_painted_one_after_the_other(folder, tmp_path):
    for name, more in (("a", []), ("b", ["--batch", "2"])):
        run(folder, "--steps", "1", "--num-images", "3", "--seed", "5", *more, "--output", str(tmp_path / f"{name}.png"), "--quiet")
    for i in "123":
        with Image.open(tmp_path / f"a-{i}.png") as a, Image.open(tmp_path / f"b-{i}.png") as b:
            assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes())) <= 1 and a.text["seed"] == b.text["seed"]


# ------------------------------------------------------------------------------- how a command ends


def test_ctrl_c_is_one_line_and_exit_code_130_whenever_it_comes(folder, tmp_path):
    """In a fresh process, while it still imports PyTorch or while it paints."""
    command = [sys.executable, "-m", "miniflux.generate", "an owl", "--model", folder, "--steps", "1000", "--width", "512", "--height", "512"]
    for seconds in (0.5, 20):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 130 and out == "" and error.startswith("stopped") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, "stopped"),
    (KeyboardInterrupt("stopped; 2 of 5 images are written"), 130, "stopped; 2 of 5 images are written"),
    (MemoryError("Unable to allocate 64 TiB"), 2, "out of memory: Unable to allocate 64 TiB"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"), 2,
     "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory"),
    (BrokenPipeError(), 141, ""),
])
def test_every_command_ends_in_one_line(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr("miniflux.command.discard", lambda stream: None)

    @command
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code and capsys.readouterr().err.strip() == line


def test_an_error_of_the_program_itself_keeps_its_traceback():
    @command
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        main()


def test_every_main_function_of_the_package_is_a_command():
    """By hand: the source of each file that has one. The networks import nothing but each other."""
    root = Path(cli.__file__).parent
    own_manners = (root / "networks" / "native.py", root / "__main__.py")
    found = 0
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main" and path not in own_manners:
                assert [ast.unparse(one) for one in node.decorator_list] == ["command"], path
                found += 1
    assert found > 20


# --------------------------------------------------------------------- the advice can be followed


def test_two_loras_of_one_name_are_both_added(folder, tmp_path):
    from safetensors.torch import save_file
    for name, factor in (("a", 0.3), ("b", 0.2)):
        (tmp_path / name).mkdir()
        save_file({"diffusion_model.txt_in.lora_A.weight": torch.full((2, 32), factor), "diffusion_model.txt_in.lora_B.weight":
                   torch.full((48, 2), factor)}, tmp_path / name / "style.safetensors")
    files = [str(tmp_path / name / "style.safetensors") for name in ("a", "b", "a")]
    run(folder, "--steps", "1", "--lora", *files, "--output", str(tmp_path / "a.png"), "--quiet")
    flux = load(folder, device="cpu")
    for file, name in zip(files, "123"):
        flux = add_lora(flux, file, name=name)
    expected, = generate(flux, "a red apple", width=32, height=48, steps=1, max_text_tokens=8)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.tobytes() == expected.tobytes()


def test_what_a_lora_has_beyond_the_model_is_left_out_by_a_flag(folder, tmp_path, capsys):
    from safetensors.torch import save_file
    save_file({f"diffusion_model.{layer}.lora_{name}.weight": torch.full(shape, 0.3) for layer in ("txt_in", "double_blocks.99.img_mod.lin")
               for name, shape in (("A", (2, 32)), ("B", (48, 2)))}, tmp_path / "a.safetensors")
    flags = ["--steps", "1", "--lora", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "a.png"), "--quiet"]
    with pytest.raises(SystemExit):
        run(folder, *flags)
    assert "--lora-lenient leaves them out" in capsys.readouterr().err
    run(folder, *flags, "--lora-lenient")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("message, expected", [
    ("steps is 0: expected a whole number", "--steps is 0: expected a whole number"),
    ("mixed.safetensors has two: choose with transformer=", "mixed.safetensors has two: choose with --transformer "),
    ("true_cfg is 'x'", "--true-cfg is 'x'"),
    ("the seed is 5 and steps/true_cfg.png does not exist", "the seed is 5 and steps/true_cfg.png does not exist"),
])
def test_errors_name_flags_and_leave_file_names_alone(message, expected):
    assert in_flags(flags.parser("generate", ""), message) == expected


@pytest.mark.parametrize("flags, note", [
    (["--negative-prompt", "cat"], "--negative-prompt acts only with --true-cfg above 1"),
    (["--true-cfg", "3"], "--true-cfg acts only with a --negative-prompt"),
    (["--lora-lenient"], "--lora-lenient acts only with --lora"),
])
def test_a_flag_without_effect_is_said(folder, tmp_path, caplog, flags, note):
    run(folder, "--steps", "1", "--output", str(tmp_path / "a.png"), *flags)
    assert any(record.message == f"{note}: it changes nothing here" for record in caplog.records)


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        flags.parser("generate", "").parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--steps", "--guidance", "--seed", "--width", "--sigmas", "--dtype", "--preview", "--quiet"):
        assert "(default" in text.split(f"{flag} ")[-1][:200], flag


def test_list_models_needs_no_prompt_and_names_the_official_ones(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        flags.parser("generate", "").parse_args(["--list-models"])
    out = capsys.readouterr().out
    assert not stop.value.code and "black-forest-labs/FLUX.1-schnell: not in" in out


def test_the_command_runs_without_a_warning(folder, tmp_path):
    """In a fresh process, with warnings as errors, and no progress bar where stderr is no terminal."""
    command = [sys.executable, "-W", "error", "-m", "miniflux.generate", "an owl", "--model", folder, "--steps", "1", "--width", "16",
               "--height", "16", "--output", "owl.png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and Path(tmp_path / "owl.png").is_file()
