"""Provenance: what a picture says of its making. Oracles: by hand, and the commands themselves."""

import importlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from imaging.test_watermark import read_in_loops
from PIL import Image
from reference import small_pipeline
from reference_vision import small_pixtral, small_vit

from miniflux import cli, flags, generate
from miniflux.imaging.info import command_in, info, marks
from miniflux.imaging.info import main as command
from miniflux.imaging.saving import save
from miniflux.imaging.watermark import MESSAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small_pipeline(tmp_path_factory.mktemp("info") / "flux"))


def run(monkeypatch, task: str, words: list[str]) -> None:
    monkeypatch.setattr("sys.argv", [task, *words])
    importlib.import_module(f"miniflux.{task}").main()


def test_the_command_of_the_tiny_model_paints_the_same_bytes(tmp_path):
    """In a shell, as a reader would: the prompt has all that a shell would take apart."""
    prompt = "a fox's \"red\" apple; $HOME `date` \\ *\nat night"
    first = [sys.executable, "-m", "miniflux.generate", prompt, "--steps", "2", "--seed", "5", "--guidance", "3.25", "--quiet", "--output", "first.png"]
    subprocess.run(first, cwd=tmp_path, check=True, capture_output=True)
    again = info(tmp_path / "first.png")["command"]
    subprocess.run(again.replace("python", shlex.quote(sys.executable), 1), shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "generate.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    assert info(tmp_path / "generate.png")["prompt"] == prompt


@pytest.mark.parametrize("task, words", [
    ("generate", ["-5 foxes & a cat"]),
    ("generate", ["a fox", "--sigmas", "1", "0.5", "--negative-prompt=-x", "--true-cfg", "2", "--watermark", "--width", "64", "--height", "64"]),
    ("image_to_image", ["a fox", "--image", "a b.png", "--strength", "0.7"]),
    ("inpaint", ["a fox", "--image", "a b.png", "--mask", "a b.png", "--mask-padding", "2"]),
    ("kontext_edit", ["a fox", "--image", "a b.png", "--no-auto-resize"]),
], ids=str)
def test_the_command_of_every_task_says_all_its_flags(folder, tmp_path, monkeypatch, task, words):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save("a b.png")
    steps = [] if "--sigmas" in words else ["--steps", "1"]
    last = words[:1] if words[0].startswith("-") else []
    words = [*words[len(last):], "--model", folder, "--device", "cpu", "--max-text-tokens", "8", "--seed", "3", *steps]
    run(monkeypatch, task, [*words, "--quiet", "--output", "first.png", *(["--", *last] if last else [])])
    again = shlex.split(info("first.png")["command"])
    assert again[:3] == ["python", "-m", f"miniflux.{task}"] and "--quiet" not in again and "--output" not in again
    run(monkeypatch, task, [*again[3:], "--output", "second.png"] if not last else [*again[3:-2], "--output", "second.png", *again[-2:]])
    with open("first.png", "rb") as first, open("second.png", "rb") as second:
        assert first.read() == second.read()


def test_of_several_pictures_each_names_its_own_seed(folder, tmp_path):
    cli.run(flags.parser("generate", ""), generate, argv=["owl", "--model", folder, "--device", "cpu", "--steps", "1", "--max-text-tokens", "8",
                                                    "--seed", "3", "--num-images", "2", "--quiet", "--output", str(tmp_path / "a.png")])
    assert "--seed 4" in info(tmp_path / "a-2.png")["command"] and "--num-images" not in info(tmp_path / "a-2.png")["command"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_the_exif_marks_are_the_originals(tmp_path, ending):
    """A name of no official model does not claim its makers."""
    for task, model, software, make in (("generate", "dev", "AI generated;txt2img;flux", "Black Forest Labs"),
                                        ("image_to_image", "krea", "AI generated;img2img;flux", "Black Forest Labs"),
                                        ("fill", "fill", "AI generated;inpainting;flux", "Black Forest Labs"),
                                        ("generate", "tiny", "AI generated;txt2img;flux", "miniflux")):
        path = tmp_path / f"a.{ending}"
        save(Image.new("RGB", (16, 16)), path, {}, marks(task, model, "a fox, 北京"))
        with Image.open(path) as picture:
            exif = picture.getexif()
            assert (exif[0x0131], exif[0x010F], exif[0x0110]) == (software, make, f"flux-{model}")
        assert info(path)["description"] == "a fox, 北京" and info(path)["software"] == software


def test_without_metadata_only_the_marks_remain(folder, tmp_path):
    cli.run(flags.parser("generate", ""), generate, argv=["a secret", "--model", folder, "--device", "cpu", "--steps", "2", "--max-text-tokens", "8",
                                                    "--quiet", "--no-metadata", "--preview", "--output", str(tmp_path / "a.png")])
    for name in ("a.png", "a-preview.png"):
        assert set(info(tmp_path / name)) == {"software", "make", "exif model"} and b"secret" not in (tmp_path / name).read_bytes()


@pytest.mark.parametrize("text, shown", [
    ("python -m miniflux.generate 'a fox'", "python -m miniflux.generate 'a fox'"),
    ("python -m miniflux.generate a; rm -rf ~", "python -m miniflux.generate 'a;' rm -rf '~'"),
    ("python -m miniflux.generate `id` $(id) && id", "python -m miniflux.generate '`id`' '$(id)' '&&' id"),
    ("rm -rf ~", None), ("python -m os", None), ("python -c miniflux.generate", None), ("python -m", None), ("", None), ("python -m miniflux.tiny.train", None),
    ("python -m miniflux.generate 'a", None), ("python -m miniflux.generate '\x1b[2J'", None), ("python -m miniflux.generate '\u202e'", None),
])
def test_a_command_from_a_strangers_picture_is_quoted_anew_or_not_shown(text, shown):
    assert command_in(text) == shown


def test_the_command_prints_what_the_picture_says(tmp_path, monkeypatch, capsys):
    save(Image.new("RGB", (16, 16)), tmp_path / "a.png", {"prompt": "a\x1b[31m fox", "command": "python -m miniflux.generate 'a fox' --seed 1"})
    monkeypatch.setattr("sys.argv", ["info", str(tmp_path / "a.png")])
    command()
    assert capsys.readouterr().out == "prompt: a\\x1b[31m fox\n\nThis paints it again:\n\npython -m miniflux.generate 'a fox' --seed 1\n"
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    command()
    assert capsys.readouterr().out == "\nIt holds no command that paints it again.\n"
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2 and "cannot be read as an image" in capsys.readouterr().err


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"nonsense", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40, b""])
def test_broken_exif_is_no_exif(tmp_path, exif):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", exif=exif)
    assert info(tmp_path / "a.png") == {}


def test_a_very_long_prompt_fits_into_a_jpeg(tmp_path):
    save(Image.new("RGB", (16, 16)), tmp_path / "a.jpg", {}, marks("generate", "dev", "a fox " * 20_000))
    assert info(tmp_path / "a.jpg")["description"].startswith("a fox a fox")


# ------------------------------------------------------------------------------------------------ --watermark, --safety


def test_the_flag_hides_the_watermark(folder, tmp_path):
    arguments = ["owl", "--model", folder, "--device", "cpu", "--steps", "1", "--max-text-tokens", "8", "--quiet", "--watermark"]
    cli.run(flags.parser("generate", ""), generate, argv=[*arguments, "--width", "96", "--height", "80", "--output", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        assert read_in_loops(np.asarray(picture)) == MESSAGE and info(tmp_path / "a.png")["watermark"] == "of FLUX.1"
    with pytest.raises(SystemExit):
        cli.run(flags.parser("generate", ""), generate, argv=[*arguments, "--width", "32", "--output", str(tmp_path / "b.png")])
    assert not (tmp_path / "b.png").exists()


@pytest.fixture
def strict(tmp_path):
    """A classifier that flags everything, one that flags nothing, and a Pixtral whose answer is always yes."""
    for name, bias in (("all", 99.0), ("none", -99.0)):
        net = small_vit(tmp_path / name)
        net.classifier.bias.data[1] = bias
        net.save_pretrained(tmp_path / name)
    return tmp_path


def paint(monkeypatch, folder: str, task: str, *words) -> None:
    run(monkeypatch, task, [*map(str, words), "--model", folder, "--device", "cpu", "--steps", "1", "--max-text-tokens", "8", "--quiet", "--preview"])


@pytest.mark.parametrize("task, words, sentence", [
    ("generate", ["owl", "--safety", "all"], "picture 1 of 1 was stopped by the content filter"),
    ("generate", ["owl", "--safety", "nowhere"], "'nowhere' is neither a folder"),
    ("generate", ["owl", "--safety", "none", "nowhere"], "'nowhere' is neither a folder"),
    ("generate", ["owl", "--safety", "none", "none", "none"], "--safety has 3 filters"),
    ("image_to_image", ["owl", "--image", "a.png", "--safety", "all"], "the image a.png was stopped by the content filter"),
])
def test_a_filter_that_is_asked_for_stops_the_picture_or_is_an_error(folder, strict, monkeypatch, capsys, task, words, sentence):
    monkeypatch.chdir(strict)
    Image.new("RGB", (32, 32), "red").save("a.png")
    before = sorted(strict.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        paint(monkeypatch, folder, task, *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1 and sorted(strict.iterdir()) == before


def test_a_filter_that_finds_nothing_changes_nothing(folder, strict, monkeypatch, capsys):
    monkeypatch.chdir(strict)
    for name, words in (("with", ["--safety", "none"]), ("without", [])):
        paint(monkeypatch, folder, "generate", "owl", *words, "--output", f"{name}.png")
    with Image.open("with.png") as a, Image.open("without.png") as b:
        assert a.tobytes() == b.tobytes()


def test_a_prompt_is_asked_about_before_anything_is_painted(folder, strict, monkeypatch, capsys):
    from miniflux.safety import filters as safety
    small_pixtral(strict / "pixtral")
    monkeypatch.chdir(strict)
    monkeypatch.setattr(safety, "says_yes", lambda filters, question: "owl" in question[0])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        paint(monkeypatch, folder, "generate", "an owl", "--safety", "none", "pixtral")
    assert "the prompt was stopped by the content filter: try another" in capsys.readouterr().err
    paint(monkeypatch, folder, "generate", "a fox", "--safety", "none", "pixtral")
