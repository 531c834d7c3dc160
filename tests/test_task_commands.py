"""The commands of the image-conditioned tasks: their flags reach the functions. Oracle: the functions; by hand."""

import importlib

import numpy as np
import pytest
from PIL import Image
from reference import small_pipeline, small_redux

from miniflux import (
    blur_mask,
    canny,
    control,
    expand_canvas,
    fill,
    inpaint,
    kontext_edit,
    kontext_inpaint,
    load,
    mask_from_alpha,
    redux,
)

TASKS = ("image_to_image", "inpaint", "fill", "control", "redux", "kontext_edit", "kontext_inpaint")
SMALL = dict(steps=1, max_text_tokens=8, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {n: small_pipeline(tmp_path_factory.mktemp("commands") / f"flux{n}", in_channels=n) for n in (64, 128, 384)}
    for part in ("image_encoder", "image_embedder"):
        (small_redux(tmp_path_factory.mktemp("redux") / "redux") / part).rename(folders[64] / part)
    return folders


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.png, mask.png, alpha.png in the current folder."""
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 8, 48, 40))
    picture.save("a.png")
    mask.save("mask.png")
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.eval(mask, lambda value: 255 - value))
    alpha.save("alpha.png")
    return tmp_path


def run(monkeypatch, task: str, *arguments) -> None:
    monkeypatch.setattr("sys.argv", [task, *map(str, arguments)])
    importlib.import_module(f"miniflux.{task}").main()


@pytest.mark.parametrize("task, channels, flags, expected", [
    ("image_to_image", 64, "owl --image a.png --strength 0.9", None),
    ("inpaint", 64, "owl --image a.png --mask mask.png --mask-padding 4 --mask-blur 2",
     lambda flux: inpaint(flux, "owl", "a.png", blur_mask("mask.png", 2), mask_padding=4, **SMALL)),
    ("inpaint", 64, "owl --image alpha.png --mask-from-alpha --width 32",
     lambda flux: inpaint(flux, "owl", "alpha.png", mask_from_alpha("alpha.png"), width=32, **SMALL)),
    ("fill", 384, "owl --image a.png --expand 16 0 0 32 --paste-back",
     lambda flux: fill(flux, "owl", *expand_canvas("a.png", 16, 0, 0, 32), paste_back=True, **SMALL)),
    ("fill", 384, "owl --image a.png --mask mask.png --strength 0.5",
     lambda flux: fill(flux, "owl", "a.png", "mask.png", strength=0.5, **SMALL)),
    ("control", 128, "owl --control-image a.png --image mask.png --mask mask.png",
     lambda flux: control(flux, "owl", "a.png", image="mask.png", mask="mask.png", **SMALL)),
    ("control", 128, "--canny a.png --thresholds 90 300 --width 64",
     lambda flux: control(flux, "", canny("a.png", 90, 300), width=64, **SMALL)),
    ("redux", 64, "--image a.png mask.png --scales 0.9 0.2 --prompt owl",
     lambda flux: redux(flux, ["a.png", "mask.png"], prompt="owl", scales=[0.9, 0.2], **SMALL)),
    ("kontext_edit", 64, "owl --image a.png --no-auto-resize --max-area 4096",
     lambda flux: kontext_edit(flux, "owl", "a.png", auto_resize=False, max_area=4096, **SMALL)),
    ("kontext_inpaint", 64, "owl --image a.png --mask mask.png --reference mask.png --strength 0.8",
     lambda flux: kontext_inpaint(flux, "owl", "a.png", "mask.png", reference="mask.png", strength=0.8, **SMALL)),
], ids=str)
def test_a_command_paints_what_its_function_paints(folders, files, monkeypatch, capsys, task, channels, flags, expected):
    run(monkeypatch, task, *flags.split(), "--model", folders[channels], "--device", "cpu", "--steps", 1, "--max-text-tokens", 8,
        "--seed", 0, "--quiet", "--preview")
    assert capsys.readouterr().out.split() == [f"{task}.png", f"{task}-preview.png"]
    with Image.open(f"{task}.png") as picture:
        if expected:
            assert picture.tobytes() == expected(load(folders[channels], device="cpu"))[0].tobytes()
        # What was given is written down, and what the task filled in.
        assert {"prompt", "model", "version", "seed", "steps", "guidance"} <= set(picture.text) and picture.text["steps"] == "1"
        assert all(flag.strip("-").replace("-", "_") in picture.text for flag in ("--strength", "--canny", "--expand") if flag in flags)


@pytest.mark.parametrize("task", TASKS)
def test_help_names_every_flag_with_its_default(monkeypatch, capsys, task):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, task, "--help")
    text = " ".join(capsys.readouterr().out.split())
    flags = {word for word in text.split(" options: ")[1].split() if word.startswith("--")}
    assert not stop.value.code and {"--steps", "--seed", "--quiet"} <= flags


@pytest.mark.parametrize("task, flags, sentence", [
    ("fill", "owl --image a.png", "one of the arguments --mask --mask-from-alpha --expand is required"),
    ("fill", "owl --image a.png --mask mask.png", "fill needs a transformer with 384 input channels, as that of the model fill"),
    ("inpaint", "owl --image a.png --mask nowhere.png", "the mask nowhere.png does not exist"),
    ("inpaint", "owl --image a.png --mask-from-alpha", "the picture has no transparent part"),
    ("inpaint", "owl --mask mask.png", "the following arguments are required: --image"),
    ("image_to_image", "owl --image a.png --strength 2", "strength is 2.0"),
    ("image_to_image", "owl --image a.png --width 8", "width is 8"),
    ("control", "owl", "one of the arguments --control-image --canny is required"),
    ("control", "owl --canny a.png --width 8", "control needs a transformer with 128 input channels"),
    ("redux", "", "the following arguments are required: --image"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(folders, files, monkeypatch, capsys, task, flags, sentence):
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, task, *flags.split(), "--model", folders[64], "--device", "cpu")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1
    assert sorted(files.iterdir()) == before
