"""The figures of variants. Oracles: by hand; true scenes, whose figures are perfect."""

import random

import numpy as np
import pytest

from miniflux import load
from miniflux.tiny.measure import evaluate_variant
from miniflux.tiny.measure.evaluate_variant import edge_f1, follows, object_box, overlap
from miniflux.tiny.world.pairs import edges
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene


def test_the_figures_of_a_true_scene_are_perfect_and_of_another_poor():
    scene, other = (sample_scene(random.Random(seed), kind="single", held_out=True)
                    for seed in (1, 2))
    image, wrong = render(scene), render(other)
    assert edge_f1(edges(image), edges(image)) == pytest.approx(1)
    assert edge_f1(edges(wrong), edges(image)) < 0.7
    assert overlap(image, scene) > 0.8 and overlap(np.zeros_like(image), scene) < 0.6
    assert (object_box(scene) == 255).sum() >= scene.objects[0].size ** 2


def test_an_edit_is_done_where_the_result_is_nearer_to_the_scene_after_it():
    """By hand: the scene after, the scene before, and one between, with the rest as it was or
    darkened."""
    before = np.full((128, 128, 3), 100, np.uint8)
    after = before.copy()
    after[:40] = 200
    assert follows(after, before, after)[0] and not follows(before, before, after)[0]
    between = before.copy()
    between[:40] = 150
    between[40:] = 90
    done, kept = follows(between, before, after)
    assert not done and kept == pytest.approx(20 * np.log10(255 / 10))
    assert np.isnan(follows(after, before, np.full_like(before, 7))[1])


def test_edits_of_held_out_scenes_are_measured():
    figures, images = evaluate_variant.measure_edits(load("tiny", device="cpu"), 7, steps=1)
    assert images.shape == (7, 128, 128, 3) and len(figures) == 4 + 7
    assert figures["instruction done, at best"] > 0.6 > figures["instruction done"]


def test_edges_are_measured_beside_the_best_that_is_possible():
    """Three steps of a shipped variant: worse than the true scenes after the autoencoder."""
    flux = load("tiny-canny", device="cpu")
    figures, images = evaluate_variant.measure(flux, "canny", 2, steps=3)
    assert images.shape == (2, 128, 128, 3)
    assert 0 < figures["edge F1"] < figures["edge F1, at best"]
    assert figures["edge F1, at best"] > 0.8


def test_a_model_of_another_kind_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        evaluate_variant.main(["fill", "--model", "tiny", "--images", "1",
                               "--output", str(tmp_path / "sheet.png")])
    assert stop.value.code == 2
    assert "fill needs a transformer with 384 input channels" in capsys.readouterr().err
