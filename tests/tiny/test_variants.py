"""Variants of the tiny model: what their training writes, `load` opens. Oracles: the base model; by hand."""

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from miniflux import generate, kontext_edit, load
from miniflux.flux import SCHEDULES
from miniflux.loading import without_guidance
from miniflux.networks.mmdit import MMDiTInputs
from miniflux.sampling import patchify, unpatchify
from miniflux.tiny import (
    evaluate_variant,
    train,
    train_kontext,
    train_schnell,
    train_variant,
)
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


def test_a_compiled_stage_compiles_its_steps_and_not_the_pictures_of_its_sheet(tmp_path, quick, monkeypatch):
    """Oracle: what the compiler is handed. Steps have four pictures, the sheet one."""
    seen, compile = [], torch.compile

    def backend(graph, inputs):
        seen.extend(x.shape for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 3)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=backend))
    with torch.enable_grad():
        train.main(["canny", "--steps", "2", "--scenes", "6", "--work", str(tmp_path), "--device", "cpu", "--compile"])
    assert (tmp_path / "canny" / "sheet.png").is_file() and (4, 64, 128) in seen and (4, 64, 64) in seen
    assert all(shape[0] == 4 for shape in seen)


def test_a_lora_is_reduced_to_the_nearest_of_its_rank():
    """Oracle: numpy's singular values; what is lost is exactly the smallest ones."""
    A, B = torch.randn(32, 64, dtype=torch.float64), torch.randn(48, 32, dtype=torch.float64)
    a, b = train_variant.reduced(A, B, 24)
    lost = np.linalg.svd((B @ A).numpy(), compute_uv=False)[24:]
    assert a.shape == (24, 64) and b.shape == (48, 24)
    assert float((B @ A - b @ a).norm()) == pytest.approx(float(np.linalg.norm(lost)), rel=1e-9)


def test_schnell_is_written_as_a_lora_with_its_guidance_and_loads_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train_schnell, "BATCH", 4)
    with torch.enable_grad():
        train.main(["schnell", "--steps", "2", "--scenes", "6", "--work", str(tmp_path), "--device", "cpu"])
    flux = load(tmp_path / "schnell", device="cpu")
    assert not flux.mmdit.config.guidance_embed and flux.config.few_steps and not flux.config.schedule.use_dynamic_shifting and (tmp_path / "schnell" / "sheet.png").is_file()
    seen = []
    picture, = generate(flux, "a cat", progress=False, on_step=lambda step, t, x: seen.append(t))
    assert seen == pytest.approx([1, 0.75, 0.5, 0.25]) and picture.size == (128, 128)
    (tmp_path / "schnell" / "variant.json").write_text('{"base": "tiny", "guidance": "strong"}')
    with pytest.raises(ValueError, match="the guidance in .*variant.json is 'strong'"):
        load(tmp_path / "schnell", device="cpu")


def test_kontext_is_written_as_a_lora_and_edits_a_picture(tmp_path, monkeypatch):
    for name, value in (("BATCH", 4), ("SHOWN", 1)):
        monkeypatch.setattr(train_kontext, name, value)
    with torch.enable_grad():
        train.main(["kontext", "--steps", "2", "--scenes", "6", "--work", str(tmp_path), "--device", "cpu"])
    flux, base = load(tmp_path / "kontext", device="cpu"), load("tiny", device="cpu")
    assert flux.mmdit.config == base.mmdit.config and (tmp_path / "kontext" / "sheet.png").is_file()
    for one, other in ((flux.mmdit, base.mmdit), (flux.clip, base.clip), (flux.t5, base.t5)):           # all three have learnt
        assert 0 < max((a - b).abs().max() for a, b in zip(one.parameters(), other.parameters())) < 0.1
    picture, = kontext_edit(flux, "make the background red", render(sample_scene(random.Random(1))), steps=2, progress=False)
    assert picture.size == (128, 128)


def test_what_an_edit_changes_counts_four_times_as_much_as_what_it_leaves():
    """By hand: one pixel in the third token of the second row; all; nothing."""
    before = np.zeros((3, 128, 128, 3), np.uint8)
    after = before.copy()
    after[0, 16, 47, 1], after[1] = 9, 9
    one, everything, nothing = train_kontext.stress(before, after)
    assert one.shape == (64, 1) and one[10] == pytest.approx(4 * 64 / 67) and float(one.mean()) == pytest.approx(1)
    assert (one == one[0]).sum() == 63 and (everything == 1).all() and (nothing == 1).all()


def test_a_variant_of_a_variant_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["schnell", "--base", "tiny-canny", "--work", str(tmp_path)])
    assert stop.value.code == 2 and "choose from" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, value", [("--minutes", "-1"), ("--minutes", "nan"), ("--steps", "0"), ("--scenes", "-5")])
def test_a_length_that_is_not_positive_is_refused(tmp_path, capsys, flag, value):
    """Minus one minute trained for ever."""
    with pytest.raises(SystemExit) as stop:
        train.main(["canny", flag, value, "--work", str(tmp_path / "work")])
    assert stop.value.code == 2 and "expected more than 0" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_guidance_that_is_folded_in_computes_the_same():
    mmdit = load("tiny", device="cpu").mmdit
    x, ids = torch.randn(2, 64, 64), (train_variant.image_ids(16, 16), train_variant.text_ids(8))
    prompt, t = (torch.randn(2, 8, 128), torch.randn(2, 128)), torch.tensor([0.3, 0.9])
    fixed = without_guidance(mmdit, 3.5)
    ours, expected, other = fixed(MMDiTInputs(x, *prompt, t, None, *ids)), *(mmdit(MMDiTInputs(x, *prompt, t, torch.full((2,), w), *ids)) for w in (3.5, 1.0))
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max() and (ours - other).abs().max() > 1e-2


def test_the_teachers_paths_are_those_of_twelve_steps(monkeypatch):
    """The kept states are a quarter of the time apart and end where twelve plain steps end."""
    flux = load("tiny", device="cpu")
    flux = replace(flux, config=replace(flux.config, schedule=SCHEDULES["schnell"], few_steps=True))
    states, txt, vec = train_schnell.paths(flux, 2, seed=3)
    assert states.shape == (2, 5, 64, 64) and len(txt) == len(vec) == 2
    caption = sample_scene(random.Random(3)).caption
    monkeypatch.setattr(sys.modules["miniflux.generate"], "noise", lambda *sizes, **kinds: unpatchify(states[:1, 0], 16, 16))
    z = generate(flux, caption, steps=12, guidance=3.5, output="latents", progress=False)
    assert (patchify(z) - states[:1, 4]).abs().mean() < 0.02              # bfloat16 products


def test_before_it_has_learnt_a_variant_paints_like_its_base_model(monkeypatch):
    """B and the further channels begin at zero: whatever they hold, nothing changes."""
    base, student = load("tiny", device="cpu"), load("tiny", device="cpu")
    train_variant.widen(student.mmdit, 64)
    changes = train_variant.with_factors(student.mmdit)
    assert len(changes) == sum(isinstance(layer, torch.nn.Linear) for layer in base.mmdit.modules())
    x, prompt = torch.randn(1, 64, 64), (torch.randn(1, 8, 128), torch.randn(1, 128), torch.tensor([0.5]), torch.tensor([3.5]))
    ids = train_variant.image_ids(16, 16), train_variant.text_ids(8)
    wide = torch.cat([x, torch.randn(1, 64, 64)], dim=-1)
    assert torch.allclose(student.mmdit(MMDiTInputs(wide, *prompt, *ids)), base.mmdit(MMDiTInputs(x, *prompt, *ids)), atol=1e-4)


def test_the_figures_of_a_true_scene_are_perfect_and_of_another_poor():
    scene, other = (sample_scene(random.Random(seed), kind="single", held_out=True) for seed in (1, 2))
    picture, wrong = render(scene), render(other)
    assert edge_f1(edges(picture), edges(picture)) == pytest.approx(1) and edge_f1(edges(wrong), edges(picture)) < 0.7
    assert overlap(picture, scene) > 0.8 and overlap(np.zeros_like(picture), scene) < 0.6
    assert (object_box(scene) == 255).sum() >= scene.objects[0].size ** 2


def test_an_edit_is_done_where_the_result_is_nearer_to_the_scene_after_it():
    """By hand: the scene after, the scene before, and one between, with the rest as it was or darkened."""
    before, after = np.full((128, 128, 3), 100, np.uint8), np.full((128, 128, 3), 100, np.uint8)
    after[:40] = 200
    assert evaluate_variant.follows(after, before, after)[0] and not evaluate_variant.follows(before, before, after)[0]
    between = before.copy()
    between[:40], between[40:] = 150, 90
    done, kept = evaluate_variant.follows(between, before, after)
    assert not done and kept == pytest.approx(20 * np.log10(255 / 10))
    assert np.isnan(evaluate_variant.follows(after, before, np.full_like(before, 7))[1])


def test_edits_of_held_out_scenes_are_measured():
    figures, pictures = evaluate_variant.measure_edits(load("tiny", device="cpu"), 7, steps=1)
    assert pictures.shape == (7, 128, 128, 3) and figures["instruction done, at best"] > 0.6 > figures["instruction done"]
    assert len(figures) == 4 + 7


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
