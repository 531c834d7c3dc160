"""Depths of pictures. Oracles: transformers' network and processor put together as the two references do; by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import small_pipeline
from reference_vision import small_depth
from transformers import DPTImageProcessorPil

from miniflux import control as control_task
from miniflux import load
from miniflux.control import main as control
from miniflux.imaging.depth import depth, load_depth, standard_size
from miniflux.imaging.depth import main as command


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """folder, transformers' network, ours."""
    theirs = small_depth(folder := tmp_path_factory.mktemp("depth"))
    return folder, theirs, load_depth(folder, device="cpu")


def photo(width: int, height: int) -> Image.Image:
    grain = np.random.default_rng(3).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)


def native(net, picture: Image.Image) -> np.ndarray:
    """What diffusers' examples do: the picture as it is, bilinear to its size, from least to most."""
    x = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
    y = F.interpolate(net(x).predicted_depth[:, None], size=x.shape[-2:], mode="bilinear", align_corners=False)
    return ((y - y.min()) / (y.max() - y.min()))[0, 0].mul(255).numpy().round()


def standard(net, picture: Image.Image) -> np.ndarray:
    """What the original repository does: the processor, bicubic with antialiasing; the depths are bytes."""
    processor = DPTImageProcessorPil(size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14,
                                     image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    y = net(processor(picture, return_tensors="pt")["pixel_values"]).predicted_depth[:, None]
    return F.interpolate(y, size=picture.size[::-1], mode="bicubic", antialias=True)[0, 0].clamp(0, 255).round().numpy()


@pytest.mark.parametrize("size", [(70, 70), (98, 56), (91, 75), (14, 40)])
def test_the_depths_are_those_of_diffusers_examples(nets, size):
    _, theirs, ours = nets
    picture = photo(*size)
    found, expected = np.asarray(depth(picture, ours)), native(theirs, picture)
    assert found.shape == (size[1], size[0], 3) and (found == found[..., :1]).all() and expected.std() > 10
    assert abs(found[..., 0] - expected).max() <= 1 and (found[..., 0] == expected).mean() > 0.99


@pytest.mark.parametrize("size", [(70, 70), (120, 80), (80, 120), (41, 33)])
def test_the_standard_depths_are_those_of_the_original_repository(nets, tmp_path, size):
    """The last convolution is scaled so that the small network's depths fill a byte, as the official one's do."""
    theirs = small_depth(tmp_path)
    for parameter in theirs.head.conv3.parameters():
        parameter.data.mul_(100)
    theirs.save_pretrained(tmp_path)
    picture = photo(*size)
    found, expected = np.asarray(depth(picture, load_depth(tmp_path, device="cpu"), standard=True))[..., 0], standard(theirs, picture)
    assert expected.std() > 5 and abs(found - expected).max() <= 1 and (found == expected).mean() > 0.99


def test_the_standard_size_keeps_the_shape_in_whole_patches(nets):
    from miniflux.networks.depth_anything import DepthAnything
    with torch.device("meta"):
        official = DepthAnything()
    assert [standard_size(*size, official) for size in ((640, 480), (518, 518), (480, 640), (1024, 1024))] == [
        (686, 518), (518, 518), (518, 686), (518, 518)]


def test_near_is_bright_whether_the_estimator_tells_nearness_or_metres(tmp_path):
    metric = load_depth(small_depth(tmp_path, depth_estimation_type="metric", max_depth=20) and tmp_path, device="cpu")
    picture = photo(70, 56)
    x = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
    metres, found = metric(x)[0], np.asarray(depth(picture, metric))[..., 0]
    assert found[np.unravel_index(metres.argmin(), metres.shape)] == 255 and found[np.unravel_index(metres.argmax(), metres.shape)] == 0
    with pytest.raises(ValueError, match="estimates metres, not bytes"):
        depth(picture, metric, standard=True)


def test_a_flat_depth_is_black(nets, tmp_path):
    theirs = small_depth(tmp_path)
    theirs.head.conv3.weight.data.zero_()
    theirs.save_pretrained(tmp_path)
    assert depth(photo(28, 28), load_depth(tmp_path, device="cpu")).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("picture, keywords, sentence", [
    (photo(13, 40), {}, "the image has 13 x 40 pixels, which the depth estimator would read as 13 x 40: expected sides of at least 14"),
    (photo(2000, 4), dict(standard=True), "would read as 70 x 0: expected"),
    (np.zeros((5000, 5000, 3), np.uint8), {}, "no more than 16,777,216 pixels"),
    ("nowhere.png", {}, "the image nowhere.png does not exist"),
])
def test_a_picture_that_cannot_be_looked_at_gets_one_sentence(nets, picture, keywords, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        depth(picture, nets[2], **keywords)


def test_an_estimator_is_found_by_its_hub_id_in_the_local_cache(nets, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="owner/depth could not be downloaded"):
        load_depth("owner/depth")
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a folder nor a Hub id: expected one such as LiheYoung/depth-anything"):
        load_depth("nowhere")
    (tmp_path / "models--owner--depth" / "snapshots").mkdir(parents=True)
    (tmp_path / "models--owner--depth" / "snapshots" / "a").symlink_to(nets[0])
    assert load_depth("owner/depth", device="cpu").config == nets[2].config


def run(monkeypatch, main, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    main()


def test_the_command_writes_what_the_function_returns(nets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo(70, 56).save("photo.png")
    for flags in ((), ("--standard",)):
        run(monkeypatch, command, "photo.png", "--model", nets[0], "--device", "cpu", *flags)
        assert capsys.readouterr().out == "depth.png\n"
        with Image.open("depth.png") as picture:
            assert picture.tobytes() == depth(photo(70, 56), nets[2], standard=bool(flags)).tobytes()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, command, "photo.png", "--model", "nowhere")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "'nowhere' is neither a folder" in error and error.count("\n") == 1


def test_control_looks_for_depths_at_the_size_to_paint(nets, tmp_path, monkeypatch, capsys):
    flux = small_pipeline(tmp_path / "flux", in_channels=128)
    monkeypatch.chdir(tmp_path)
    photo(64, 48).save("photo.png")
    flags = ("--depth", "photo.png", "--width", 64, "--model", flux, "--device", "cpu", "--steps", 1, "--max-text-tokens", 8, "--quiet")
    run(monkeypatch, control, *flags, "--depth-model", nets[0])
    expected, = control_task(load(flux, device="cpu"), "", depth(photo(64, 48), nets[2]), width=64, steps=1, max_text_tokens=8, progress=False)
    with Image.open("control.png") as picture:
        assert picture.tobytes() == expected.tobytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, control, *flags)
    assert "--depth needs an estimator: give --depth-model" in capsys.readouterr().err
