"""Canny's edges. Oracle: OpenCV's `cv2.Canny`, pixel by pixel; and by hand."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from samples import SHARED

from miniflux import canny
from miniflux.imaging.canny import hysteresis


def shapes() -> Image.Image:
    picture = Image.new("RGB", (257, 191), "navy")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 20, 150, 120), fill="orange", outline="white")
    draw.polygon([(160, 150), (250, 30), (200, 180)], fill="lime")
    draw.line((0, 190, 256, 0), fill="red", width=3)
    return picture


def noise(width: int, height: int, scale: int) -> Image.Image:
    grain = np.random.default_rng(scale).integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)
    return Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)


def agreement(picture: Image.Image, low: float, high: float) -> float:
    ours, theirs = np.asarray(canny(picture, low, high))[..., 0], cv2.Canny(np.asarray(picture), low, high)
    assert 0 < (theirs > 0).mean() < 0.5
    return (ours == theirs).mean()


@pytest.mark.parametrize("thresholds", [(50, 200), (100, 200), (0, 0), (200, 50), (99.5, 300)])
@pytest.mark.parametrize("picture", [shapes(), noise(300, 200, 1), noise(400, 300, 10), noise(61, 1, 1), shapes().convert("L").convert("RGB")],
                         ids=["shapes", "noise", "hills", "a row", "grey"])
def test_the_edges_are_opencvs(picture, thresholds):
    assert agreement(picture, *thresholds) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the pictures lie beside the repository")
@pytest.mark.parametrize("thresholds", [(50, 200), (100, 200)])
def test_the_edges_of_a_photo_are_opencvs(thresholds):
    assert agreement(Image.open(SHARED / "robot.webp").convert("RGB"), *thresholds) >= 0.999


def test_weak_edges_stay_where_a_chain_leads_to_a_strong_one():
    weak = np.array([[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 1, 1, 0]], bool)
    strong = np.zeros_like(weak)
    strong[0, 0] = True
    assert np.array_equal(hysteresis(weak, strong), weak)
    assert not hysteresis(weak, np.zeros_like(weak)).any()


def test_a_flat_picture_has_no_edges_and_a_wrong_threshold_gets_one_sentence():
    assert canny(Image.new("RGB", (1, 1))).getextrema() == ((0, 0),) * 3
    with pytest.raises(ValueError, match="the threshold low is -1"):
        canny(Image.new("RGB", (4, 4)), -1, 200)


def test_the_command_writes_what_the_function_finds(tmp_path, monkeypatch, capsys):
    from miniflux.imaging.canny import main
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 90).convert("RGB").save("a.png")
    monkeypatch.setattr("sys.argv", ["canny", "a.png", "--thresholds", "90", "300"])
    main()
    assert capsys.readouterr().out == "canny.png\n" and Image.open("canny.png").tobytes() == canny("a.png", 90, 300).tobytes()
    monkeypatch.setattr("sys.argv", ["canny", "nowhere.png"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "nowhere.png does not exist" in capsys.readouterr().err
