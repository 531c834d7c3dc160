"""The commands of the image-conditioned tasks: their flags reach the functions.
Oracle: the functions; by hand."""

import importlib

import numpy as np
import pytest
from PIL import Image
from reference import clip_vision, controlnet, ip_adapter_state, small_pipeline, small_redux
from safetensors.torch import save_file

from miniflux import (
    add_ip_adapter,
    blur_mask,
    canny,
    control,
    expand_canvas,
    fill,
    image_to_image,
    inpaint,
    kontext_edit,
    kontext_inpaint,
    load,
    load_controlnet,
    mask_from_alpha,
    redux,
)

TASKS = ("image_to_image", "inpaint", "fill", "control", "redux", "kontext_edit", "kontext_inpaint")
SMALL = dict(steps=1, max_text_tokens=8, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Input channels -> a small random model; the one with 64 has Redux."""
    path = tmp_path_factory.mktemp("commands")
    folders = {n: small_pipeline(path / f"flux{n}", in_channels=n) for n in (64, 128, 384)}
    redux_folder = small_redux(path / "redux")
    for part in ("image_encoder", "image_embedder"):
        (redux_folder / part).rename(folders[64] / part)
    return folders


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """net/, union/, ip.safetensors and image_encoder/ in a folder."""
    path = tmp_path_factory.mktemp("adapters")
    controlnet().save_pretrained(path / "net")
    controlnet(modes=7).save_pretrained(path / "union")
    clip_vision().save_pretrained(path / "image_encoder")
    save_file(ip_adapter_state(), path / "ip.safetensors")
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.png, mask.png, alpha.png in the current folder."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 8, 48, 40))
    image.save("a.png")
    mask.save("mask.png")
    alpha = image.convert("RGBA")
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
     lambda flux: inpaint(flux, "owl", "alpha.png", mask_from_alpha("alpha.png"), width=32,
                          **SMALL)),
    ("fill", 384, "owl --image a.png --expand 16 0 0 32 --paste-back",
     lambda flux: fill(flux, "owl", *expand_canvas("a.png", 16, 0, 0, 32), paste_back=True,
                       **SMALL)),
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
     lambda flux: kontext_inpaint(flux, "owl", "a.png", "mask.png", reference="mask.png",
                                  strength=0.8, **SMALL)),
])
def test_a_command_generates_what_its_function_generates(
        folders, files, monkeypatch, capsys, task, channels, flags, expected):
    usual = "--device cpu --steps 1 --max-text-tokens 8 --seed 0 --quiet --preview".split()
    run(monkeypatch, task, *flags.split(), "--model", folders[channels], *usual)
    assert capsys.readouterr().out.split() == [f"{task}.png", f"{task}-preview.png"]
    with Image.open(f"{task}.png") as image:
        if expected:
            function_image, = expected(load(folders[channels], device="cpu"))
            assert image.tobytes() == function_image.tobytes()
        # The file records what was given, and what the task filled in.
        assert {"prompt", "model", "version", "seed", "steps", "guidance"} <= set(image.text)
        assert image.text["steps"] == "1"
        for name in ("strength", "canny", "expand"):
            if f"--{name}" in flags:
                assert name in image.text


def test_controlnets_and_ip_adapters_are_given_by_flags(folders, adapters, files, monkeypatch):
    run(monkeypatch, "image_to_image", "owl", "--image", "a.png", "--model", folders[64],
        "--device", "cpu", "--steps", 1, "--max-text-tokens", 8, "--quiet",
        "--controlnet", adapters / "net", adapters / "union",
        "--control-image", "a.png", "mask.png",
        "--control-scale", 0.7,
        "--control-mode", "none", "pose",
        "--ip-adapter", adapters / "ip.safetensors",
        "--ip-image", "mask.png",
        "--ip-scale", 0.6)
    flux = add_ip_adapter(load(folders[64], device="cpu"), adapters / "ip.safetensors")
    net, union = (load_controlnet(adapters / name, device="cpu") for name in ("net", "union"))
    controlnets = [(net, "a.png", 0.7), (union, "mask.png", 0.7, 0.0, 1.0, "pose")]
    expected, = image_to_image(flux, "owl", "a.png", controlnet=controlnets,
                               ip_image="mask.png", ip_scale=0.6, **SMALL)
    with Image.open("image_to_image.png") as image:
        assert image.tobytes() == expected.tobytes()
        assert "union" in image.text["controlnet"]


@pytest.mark.parametrize("task", TASKS)
def test_help_names_every_flag_with_its_default(monkeypatch, capsys, task):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, task, "--help")
    text = " ".join(capsys.readouterr().out.split())
    flags = {word for word in text.split(" options: ")[1].split() if word.startswith("--")}
    assert not stop.value.code
    assert {"--steps", "--seed", "--quiet"} <= flags


@pytest.mark.parametrize("task, flags, sentence", [
    ("fill", "owl --image a.png",
     "one of the arguments --mask --mask-from-alpha --expand is required"),
    ("fill", "owl --image a.png --mask mask.png",
     "fill needs a transformer with 384 input channels, as that of the model fill"),
    ("inpaint", "owl --image a.png --mask nowhere.png", "the mask nowhere.png does not exist"),
    ("inpaint", "owl --image a.png --mask-from-alpha", "the image has no transparent part"),
    ("inpaint", "owl --mask mask.png", "the following arguments are required: --image"),
    ("image_to_image", "owl --image a.png --strength 2", "strength is 2.0"),
    ("image_to_image", "owl --image a.png --width 8", "width is 8"),
    ("control", "owl", "one of the arguments --control-image --canny --depth is required"),
    ("control", "owl --canny a.png --width 8",
     "control needs a transformer with 128 input channels"),
    ("redux", "", "the following arguments are required: --image"),
    ("generate", "owl --controlnet net.safetensors",
     "there are 0 values of --control-image for 1 ControlNets"),
    ("generate", "owl --control-image a.png",
     "--control-image without a ControlNet: name one by --controlnet, or use the task control"),
    ("generate", "owl --controlnet nowhere.safetensors --control-image a.png",
     "the ControlNet nowhere.safetensors does not exist"),
    ("generate", "owl --ip-image a.png", "name one by --ip-adapter"),
    ("inpaint", "owl --image a.png --mask mask.png --negative-ip-image a.png",
     "name one by --ip-adapter"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(
        folders, files, monkeypatch, capsys, task, flags, sentence):
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, task, *flags.split(), "--model", folders[64], "--device", "cpu")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(files.iterdir()) == before
