"""The figures of tiny models. Oracles: by hand; a painter that paints every prompt truly but for
known mistakes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from miniflux.networks.autoencoder import Autoencoder, AutoencoderConfig
from miniflux.tiny.measure import evaluate, judge
from miniflux.tiny.measure.evaluate import answers, held_out_scenes, rates
from miniflux.tiny.measure.judge import Found, Verdict
from miniflux.tiny.world import glyphs
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import Placed, Scene, is_held_out
from miniflux.tiny.world.words import ALL_OBJECTS, OBJECTS


def seen(
    *objects: tuple[str, str | None, int, int], ground: str = "red", score: float = 0.9
) -> Verdict:
    return Verdict(
        ground, tuple(Found(name, colour, x, y, 50, score) for name, colour, x, y in objects)
    )


def scene(kind: str, *objects: tuple[str, str | None], relation: str | None = None) -> Scene:
    return Scene(
        tuple(Placed(name, colour, 0, 0, 50) for name, colour in objects), "red", "", kind, relation
    )


def test_the_round_trip_goes_through_the_models_own_autoencoder():
    config = AutoencoderConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=4)
    pictures = np.stack([render(s) for s in held_out_scenes(2, 0, ("object",))])
    network, x = (
        Autoencoder(config).eval(),
        torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1,
    )
    expected = (network.decode(network.encode(x)) / 2 + 0.5).clamp(0, 1).permute(
        0, 2, 3, 1
    ).numpy() * 255
    decoded = evaluate.round_trip(SimpleNamespace(autoencoder=network), pictures)
    assert (
        decoded.dtype == np.uint8
        and decoded.shape == pictures.shape
        and np.abs(decoded - expected).max() < 1
    )


def test_each_question_is_answered_by_what_is_seen():
    """By hand: one right and one wrong picture of each question."""
    cat, blue_car = scene("single", ("cat", None)), scene("single", ("car", "blue"))
    assert answers(seen(("cat", None, 64, 64)), cat) == dict(ground=True, object=True, sharp=True)
    assert answers(seen(("dog", None, 64, 64), ground="blue"), cat) == dict(
        ground=False, object=False, sharp=False
    )
    assert answers(seen(("cat", None, 64, 64), score=0.3), cat)["sharp"] is False
    assert (
        answers(seen(("car", "blue", 64, 64)), blue_car)["colour"]
        and not answers(seen(("car", None, 64, 64)), blue_car)["colour"]
    )
    assert answers(seen(("car", None, 64, 64)), scene("single", ("car", "red")))[
        "colour"
    ]  # red by itself
    above = scene("pair", ("owl", None), ("bee", None), relation="above")
    assert answers(seen(("bee", None, 64, 96), ("owl", None, 64, 32)), above) == dict(
        ground=True, two=True, relation=True
    )
    assert answers(seen(("bee", None, 64, 32), ("owl", None, 64, 96)), above) == dict(
        ground=True, two=True, relation=False
    )
    assert answers(seen(("bee", None, 64, 32)), above) == dict(
        ground=True, two=False, relation=False
    )
    bees = scene("count", ("bee", None), ("bee", None))
    assert answers(seen(("bee", None, 32, 64), ("bee", None, 96, 64)), bees)["count"]
    for wrong in (
        [("bee", None, 32, 64)],
        [("bee", None, 32, 64), ("owl", None, 96, 64)],
        [("bee", None, x, 64) for x in (20, 64, 100)],
    ):
        assert not answers(seen(*wrong), bees)["count"]


@pytest.mark.parametrize(
    "relation, first, second",
    [
        ("left of", (32, 64), (96, 64)),
        ("right of", (96, 64), (32, 64)),
        ("above", (64, 32), (64, 96)),
        ("below", (64, 96), (64, 32)),
    ],
)
def test_a_relation_is_read_from_the_centres(relation, first, second):
    pair = scene("pair", ("owl", None), ("bee", None), relation=relation)
    assert answers(seen(("owl", None, *first), ("bee", None, *second)), pair)["relation"]
    assert not answers(seen(("owl", None, *second), ("bee", None, *first)), pair)["relation"]


def test_rates_are_means_over_the_pictures_that_were_asked():
    asked = [scene("single", ("cat", None))] * 3 + [scene("count", ("bee", None), ("bee", None))]
    found = rates(
        [
            seen(("cat", None, 64, 64)),
            seen(("dog", None, 64, 64)),
            seen(("cat", None, 64, 64), score=0.2),
            seen(("bee", None, 1, 1)),
        ],
        asked,
    )
    assert (found.object, found.sharp, found.count, found.ground) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
        0,
        1,
    )
    assert math.isnan(found.two) and math.isnan(found.relation) and math.isnan(found.colour)


@pytest.fixture
def painter(monkeypatch):
    """Stands in for a model: it paints every prompt truly, but the wrong ground in picture 3, and
    remembers its calls."""
    facts, calls = {s.caption: s for n in (4, 12) for s in held_out_scenes(n)}, []

    def generate(flux, prompts, *, seed, **keywords):
        calls.append((len(prompts), seed))
        scenes = [
            replace(facts[p], ground="blue" if facts[p].ground != "blue" else "pink")
            if seed + i == 3
            else facts[p]
            for i, p in enumerate(prompts)
        ]
        return [Image.fromarray(render(s)) for s in scenes]

    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "round_trip", lambda flux, pictures: pictures)
    monkeypatch.setattr(evaluate, "load", lambda name: None)
    return calls


def test_the_report_counts_what_the_model_paints(painter):
    report = evaluate.evaluate(None, held_out_scenes(12, 0, ("object",)))
    assert report.painted.ground == 11 / 12 and report.rendered.ground == report.decoded.object == 1
    assert report.images.shape == (12, 128, 128, 3) and painter == [
        (10, 0),
        (2, 10),
    ]  # picture i from seed + i


def test_only_held_out_combinations_are_measured(painter):
    for asked in held_out_scenes(20):
        assert all(is_held_out(o.name, asked.ground) for o in asked.objects)
    names = {o.name for asked in held_out_scenes(40, objects=ALL_OBJECTS) for o in asked.objects}
    assert {o.name for asked in held_out_scenes(40) for o in asked.objects} <= set(OBJECTS)
    assert names - set(OBJECTS)  # the first model's word list is larger
    assert len(held_out_scenes(20)) == 80 and held_out_scenes(5) == held_out_scenes(
        5
    ) != held_out_scenes(5, seed=1)
    with pytest.raises(ValueError, match="'a cat on a blue background' is no held-out"):
        evaluate.evaluate(
            None,
            [
                Scene(
                    (Placed("cat", None, 30, 30, 60),),
                    "blue",
                    "a cat on a blue background",
                    "single",
                )
            ],
        )
    assert painter == []


def test_the_command_prints_a_table_and_writes_a_sheet_and_nothing_else(painter, tmp_path, capsys):
    evaluate.main(["some-model", "--prompts", "4", "--output", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert (
        "16 held-out images" in lines[0]
        and lines[1].split()[-1] == "94%"
        and lines[2].split()[-1] == "100%"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no-such-model"], "no-such-model"),
        (["--prompts", "0"], "--prompts is 0"),
        (["--output", "/nowhere/sheet.png"], "/nowhere"),
    ],
)
def test_a_mistake_is_answered_with_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1


def test_without_the_font_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(glyphs, "FONT_PATHS", ("/nowhere/NotoColorEmoji.ttf",))
    for cache in (judge.sprites, glyphs.stamp, glyphs._glyph):
        cache.cache_clear()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "fonts-noto-color-emoji" in message and message.count("\n") == 1
