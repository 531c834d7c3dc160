"""Variants of the tiny model: what their training writes, `load` opens. Oracles: the base model; by hand."""

import random

import numpy as np
import pytest
import torch

from miniflux import load
from miniflux.tiny import evaluate_variant, train, train_variant
from miniflux.tiny.evaluate_variant import edge_f1, object_box, overlap
from miniflux.tiny.pairs import edges
from miniflux.tiny.scenes import render, sample_scene


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(train_variant, "BATCH", 4)
    monkeypatch.setattr(train_variant, "SHOWN", 1)


@pytest.mark.parametrize("variant, channels", [("fill", 384), ("canny", 128)])
def test_a_stage_writes_a_folder_that_load_opens(tmp_path, quick, capsys, variant, channels):
    with torch.enable_grad():
        train.main([variant, "--steps", "2", "--scenes", "6", "--work", str(tmp_path), "--device", "cpu"])
    flux = load(tmp_path / variant, device="cpu")
    assert flux.mmdit.config.in_channels == channels and (tmp_path / variant / "sheet.png").is_file()
    base = load("tiny", device="cpu").mmdit
    change = flux.mmdit.img_in.weight[:, :64] - base.img_in.weight
    assert 0 < change.abs().max() < 0.1


def test_before_it_has_learnt_a_variant_paints_like_its_base_model(monkeypatch):
    """B and the further channels begin at zero: whatever they hold, nothing changes."""
    base, student = load("tiny", device="cpu"), load("tiny", device="cpu")
    changes = train_variant.with_factors(student.mmdit, 64)
    assert len(changes) == sum(isinstance(layer, torch.nn.Linear) for layer in base.mmdit.modules())
    x, prompt = torch.randn(1, 64, 64), (torch.randn(1, 8, 128), torch.randn(1, 128), torch.tensor([0.5]), torch.tensor([3.5]))
    ids = train_variant.image_ids(16, 16), train_variant.text_ids(8)
    wide = torch.cat([x, torch.randn(1, 64, 64)], dim=-1)
    assert torch.allclose(student.mmdit(wide, *prompt, *ids), base.mmdit(x, *prompt, *ids), atol=1e-4)


def test_the_figures_of_a_true_scene_are_perfect_and_of_another_poor():
    scene, other = (sample_scene(random.Random(seed), kind="single", held_out=True) for seed in (1, 2))
    picture, wrong = render(scene), render(other)
    assert edge_f1(edges(picture), edges(picture)) == pytest.approx(1) and edge_f1(edges(wrong), edges(picture)) < 0.7
    assert overlap(picture, scene) > 0.8 and overlap(np.zeros_like(picture), scene) < 0.6
    assert (object_box(scene) == 255).sum() >= scene.objects[0].size ** 2


def test_the_command_measures_a_variant(tmp_path, quick, capsys, monkeypatch):
    """Untrained, so it cannot be good; the figures at best are those of the autoencoder."""
    monkeypatch.chdir(tmp_path)
    with torch.enable_grad():
        train.main(["canny", "--steps", "1", "--scenes", "4", "--work", str(tmp_path), "--device", "cpu"])
    figures, pictures = evaluate_variant.measure(load(tmp_path / "canny", device="cpu"), "canny", 2, steps=1)
    assert pictures.shape == (2, 128, 128, 3) and figures["edge F1, at best"] > 0.8 > figures["edge F1"]
    with pytest.raises(SystemExit) as stop:
        evaluate_variant.main(["fill", "--model", "tiny", "--pictures", "1"])
    assert stop.value.code == 2 and "fill needs a transformer with 384 input channels" in capsys.readouterr().err
