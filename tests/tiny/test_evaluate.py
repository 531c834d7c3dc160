"""The judge of tiny models. Oracles by hand: scenes whose facts are known, and pictures that show no object by construction."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from miniflux.networks.autoencoder import Autoencoder, AutoencoderConfig
from miniflux.tiny import evaluate, glyphs
from miniflux.tiny.evaluate import THRESHOLD, Rates, Verdict, judge, rates, true_scenes
from miniflux.tiny.grounds import PLAIN, paint_ground
from miniflux.tiny.scenes import Placed, Scene, held_out_prompts, is_held_out, render


@pytest.fixture(scope="module")
def rendered():
    return true_scenes(60, seed=100)


def paint(name: str, ground: str, x: int = 24, y: int = 20, size: int = 80) -> np.ndarray:
    return render(Scene((Placed(name, None, x, y, size),), ground, "", "single"))


def shuffle(picture: np.ndarray, block: int, rng: random.Random, margin: int = 0) -> np.ndarray:
    """The same blocks in another order; those of the margin stay."""
    corners = [(y, x) for y in range(margin, 128 - margin, block) for x in range(margin, 128 - margin, block)]
    scrambled = picture.copy()
    for (y, x), (v, u) in zip(corners, rng.sample(corners, len(corners))):
        scrambled[y:y + block, x:x + block] = picture[v:v + block, u:u + block]
    return scrambled


def test_the_judge_names_object_and_ground_of_rendered_scenes(rendered):
    pictures, truth = rendered
    found = rates(judge(pictures), truth)
    assert found.object >= 0.95 and found.ground == 1


def test_the_judge_does_not_mind_where_and_how_large_the_object_is():
    for x, y, size in ((16, 16, 72), (40, 44, 72), (18, 18, 93)):
        verdict, = judge(paint("fox", "blue", x, y, size)[None])
        assert (verdict.object, verdict.ground) == ("fox", "blue") and THRESHOLD < verdict.score <= 1


def test_the_score_is_one_where_picture_and_sprite_are_equal_and_zero_on_a_flat_picture():
    flat = np.full((128, 128, 3), 90, np.uint8)
    same = flat.copy()
    stamp = np.float32(glyphs.stamp("owl", None, 80))
    same[24:104, 24:104] = (stamp[..., :3] - 90) * stamp[..., 3:] / 255 + 90.5
    assert [round(v.score, 2) for v in judge(np.stack([same, flat]))] == [1, 0]


def test_a_plain_ground_holds_no_sharp_object():
    verdicts = judge(np.stack([paint_ground(ground, seed=3) for ground in PLAIN]).round().astype(np.uint8))
    assert [(v.ground, v.sharp) for v in verdicts] == [(ground, False) for ground in PLAIN]


def test_scrambled_and_blurred_objects_are_not_sharp(rendered):
    rng = random.Random(0)
    for picture in rendered[0][:5]:
        blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(8)))
        spoilt = shuffle(picture, 16, rng), shuffle(picture, 16, rng, margin=16), shuffle(picture, 8, rng, margin=16), blurred
        assert not any(v.sharp for v in judge(np.stack(spoilt)))


def test_a_blob_of_the_right_colour_is_not_the_sharp_object():
    y, x = np.mgrid[-64:64, -64:64]
    for name, ground in (("cat", "blue"), ("frog", "white"), ("rocket", "green"), ("bus", "white"), ("bee", "pink")):
        picture = paint(name, ground)
        colour = picture[40:90, 40:90].mean((0, 1))
        picture[:] = picture[0, 0]
        picture[np.hypot(x, y) < 36] = colour
        verdict, = judge(picture[None])
        assert verdict.object != name or not verdict.sharp


def test_two_objects_side_by_side_are_not_one_sharp_object():
    pair = Scene((Placed("cat", None, 6, 38, 54), Placed("cat", None, 68, 38, 54)), "blue", "", "pair")
    assert not judge(render(pair)[None])[0].sharp


def test_the_round_trip_goes_through_the_models_own_autoencoder():
    config = AutoencoderConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=4)
    pictures = np.stack([paint("cat", "blue"), paint("bee", "white")])
    network, x = Autoencoder(config).eval(), torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    expected = (network.decode(network.encode(x)) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    decoded = evaluate.round_trip(SimpleNamespace(autoencoder=network), pictures)
    assert decoded.dtype == np.uint8 and decoded.shape == pictures.shape and np.abs(decoded - expected).max() < 1


def test_rates_count_objects_sharp_objects_and_grounds_apart():
    verdicts = [Verdict("red", "cat", 0.9), Verdict("red", "cat", 0.2), Verdict("blue", "dog", 0.9), Verdict("blue", "owl", 0.9)]
    assert rates(verdicts, [("cat", "red"), ("cat", "red"), ("dog", "red"), ("cat", "blue")]) == Rates(object=0.75, sharp=0.5, ground=0.75)


@pytest.fixture
def painter(monkeypatch):
    """Stands in for a model: it paints every prompt truly, but a cat instead of picture 3, and remembers its calls."""
    facts, calls = {prompt: (name, ground) for prompt, name, ground in held_out_prompts(80)}, []

    def generate(flux, prompts, *, seed, **keywords):
        calls.append((len(prompts), seed))
        return [Image.fromarray(paint("cat", "blue") if seed + i == 3 else paint(*facts[p])) for i, p in enumerate(prompts)]

    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "round_trip", lambda flux, pictures: pictures)
    monkeypatch.setattr(evaluate, "load", lambda name: None)
    return calls


def test_the_report_counts_what_the_model_paints(painter):
    prompts = held_out_prompts(12)
    assert prompts[3][1:] != ("cat", "blue")
    report = evaluate.evaluate(None, prompts)
    assert report.painted.object == 11 / 12 and report.rendered == report.decoded == Rates(1, 1, 1)
    assert report.verdicts[3].object == "cat" and report.pictures.shape == (12, 128, 128, 3)
    assert painter == [(10, 0), (2, 10)]                   # picture i from seed + i


def test_only_held_out_pairs_are_measured(painter):
    assert all(is_held_out(name, ground) for _, name, ground in held_out_prompts(200))
    assert all(is_held_out(name, ground) for name, ground in true_scenes(20)[1])
    with pytest.raises(ValueError, match="'a cat on a blue background' is no held-out"):
        evaluate.evaluate(None, [("a cat on a blue background", "cat", "blue")])
    assert painter == []


def test_the_command_prints_a_table_and_writes_a_sheet_and_nothing_else(painter, tmp_path, capsys):
    evaluate.main(["some-model", "--prompts", "4", "--output", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert "4 held-out pictures" in lines[0] and lines[1].split()[-3] == "75%" and lines[2].split()[-2:] == ["100%", "100%"]
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("arguments, words", [
    (["no-such-model"], "no-such-model"), (["--prompts", "0"], "--prompts is 0"), (["--output", "/nowhere/sheet.png"], "/nowhere")])
def test_a_mistake_is_answered_with_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1


def test_without_the_font_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(glyphs, "FONT_PATHS", ("/nowhere/NotoColorEmoji.ttf",))
    for cache in (evaluate.sprites, glyphs.stamp, glyphs._glyph):
        cache.cache_clear()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "fonts-noto-color-emoji" in message and message.count("\n") == 1
