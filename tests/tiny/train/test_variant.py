"""Variants of the tiny model: `load` opens what their training writes. Oracles: the base model; by
hand."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from miniflux import generate, kontext_edit, load
from miniflux.adapters.lora_layers import insert_loras
from miniflux.flux import SCHEDULES
from miniflux.loading import without_guidance
from miniflux.networks.mmdit import MMDiTInputs
from miniflux.sampling import euler, flow, image_ids, text_ids
from miniflux.tiny.train import __main__ as command
from miniflux.tiny.train import kontext, lora, schnell, variant, velocity
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu")


@pytest.fixture
def quick(monkeypatch):
    for module in (variant, kontext, schnell):
        monkeypatch.setattr(module, "BATCH", 4)
    for module in (variant, kontext):
        monkeypatch.setattr(module, "SHOWN", 1)


def train(stage, work, *arguments, steps: int = 2) -> None:
    with torch.enable_grad():                              # the suite runs without gradients
        command.main([stage, "--steps", str(steps), "--scenes", "6", "--work", str(work),
                      "--device", "cpu", *arguments])


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    """x (B, 64, 64), txt, pooled, t."""
    torch.manual_seed(0)
    return (torch.randn(batch, 64, 64), torch.randn(batch, 8, 128), torch.randn(batch, 128),
            torch.tensor([0.3, 0.9])[:batch])


IDS = image_ids(16, 16), text_ids(8)


# ------------------------------------------------------------------------- fill, canny and depth


@pytest.mark.parametrize("name, channels", [("fill", 384), ("canny", 128)])
def test_a_stage_writes_a_folder_that_load_opens(tmp_path, quick, tiny, name, channels):
    train(name, tmp_path)
    flux = load(tmp_path / name, device="cpu")
    assert flux.mmdit.config.in_channels == channels and (tmp_path / name / "sheet.png").is_file()
    change = flux.mmdit.img_in.weight[:, :64] - tiny.mmdit.img_in.weight
    assert 0 < change.abs().max() < 0.1


def test_a_compiled_stage_compiles_its_steps_and_not_its_sheet(tmp_path, quick, monkeypatch):
    """Oracle: what the compiler is given. Steps have four images, the sheet one."""
    torch.compiler.reset()                                  # graphs of other tests would be taken
    seen, compile = [], torch.compile

    def backend(graph, inputs):
        seen.extend(x.shape for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 3)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=backend))
    train("canny", tmp_path, "--compile")
    assert (tmp_path / "canny" / "sheet.png").is_file()
    assert {(4, 64, 192), (4, 96, 192)} <= set(map(tuple, seen))               # double and single
    assert all(shape[0] == 4 for shape in seen)


def test_a_variant_of_a_variant_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["schnell", "--base", "tiny-canny", "--work", str(tmp_path)])
    assert stop.value.code == 2 and "choose from" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, value", [
    ("--minutes", "-1"), ("--minutes", "nan"), ("--steps", "0"), ("--scenes", "-5")])
def test_a_length_that_is_not_positive_is_refused(tmp_path, capsys, flag, value):
    """Minus one minute trained for ever."""
    with pytest.raises(SystemExit) as stop:
        command.main(["canny", flag, value, "--work", str(tmp_path / "work")])
    assert stop.value.code == 2 and "expected more than 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_before_it_has_learnt_a_variant_equals_its_base_model(tiny):
    """B and the weights of further channels begin at zero: whatever they hold, nothing changes."""
    student = load("tiny", device="cpu").mmdit
    variant.widen(student, 64)
    changes = insert_loras(student, 4)
    layers = [layer for layer in tiny.mmdit.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(changes) == len(layers)
    x, txt, pooled, t = inputs()
    wide = torch.cat([x, torch.randn(2, 64, 64)], dim=-1)
    rest = txt, pooled, t, torch.tensor([3.5, 3.5]), *IDS
    ours, expected = student(MMDiTInputs(wide, *rest)), tiny.mmdit(MMDiTInputs(x, *rest))
    assert torch.allclose(ours, expected, atol=1e-4)


def test_a_lora_is_reduced_to_the_nearest_of_its_rank():
    """Oracle: numpy's singular values; what is lost is exactly the smallest ones."""
    A, B = torch.randn(32, 64, dtype=torch.float64), torch.randn(48, 32, dtype=torch.float64)
    a, b = lora.reduced(A, B, 24)
    lost = np.linalg.svd((B @ A).numpy(), compute_uv=False)[24:]
    assert a.shape == (24, 64) and b.shape == (48, 24)
    assert float((B @ A - b @ a).norm()) == pytest.approx(float(np.linalg.norm(lost)), rel=1e-9)


def test_the_guidance_of_the_base_model_is_taken_out_of_what_a_variant_learns(tiny):
    """By hand: the base model itself, with guidance w, is left with its velocity of guidance 1."""
    _, txt, pooled, t = inputs()
    x, w = torch.randn(2, 16, 16, 16), torch.tensor([2.0, 6.0])
    guided = velocity.velocity(tiny.mmdit, txt, pooled, w)
    plain = velocity.velocity(tiny.mmdit, txt, pooled, 1.0)
    left = velocity.without_guidance(guided, tiny.mmdit, txt, pooled, w)
    assert torch.allclose(left(x, t), plain(x, t), atol=1e-5)
    assert not torch.allclose(guided(x, t), plain(x, t), atol=1e-3)


# --------------------------------------------------------------------------------------- schnell


def test_schnell_is_written_with_its_guidance_and_loads_without_one(tmp_path, quick):
    train("schnell", tmp_path)
    folder = tmp_path / "schnell"
    flux = load(folder, device="cpu")
    assert not flux.mmdit.config.guidance_embed and flux.config.few_steps
    assert not flux.config.schedule.use_dynamic_shifting and (folder / "sheet.png").is_file()
    seen = []
    image, = generate(flux, "a cat", progress=False, on_step=lambda step, t, x: seen.append(t))
    assert seen == pytest.approx([1, 0.75, 0.5, 0.25]) and image.size == (128, 128)
    (folder / "variant.json").write_text('{"base": "tiny", "guidance": "strong"}')
    with pytest.raises(ValueError, match="the guidance in .*variant.json is 'strong'"):
        load(folder, device="cpu")


def test_a_guidance_that_is_folded_in_computes_the_same(tiny):
    x, txt, pooled, t = inputs()
    fixed = without_guidance(tiny.mmdit, 3.5)
    ours = fixed(MMDiTInputs(x, txt, pooled, t, None, *IDS))
    expected, other = (tiny.mmdit(MMDiTInputs(x, txt, pooled, t, torch.full((2,), w), *IDS))
                       for w in (3.5, 1.0))
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (ours - other).abs().max() > 1e-2


def test_the_teachers_paths_are_those_of_twelve_steps(tiny):
    """The kept states are a quarter of the time apart and end where twelve plain steps end."""
    flux = replace(tiny, config=replace(tiny.config, schedule=SCHEDULES["schnell"]))
    states, txt, pooled = schnell.paths(flux, 2, seed=3)
    assert states.shape == (2, 5, 16, 16, 16) and len(txt) == len(pooled) == 2
    states, txt, pooled = states.float(), txt.float(), pooled.float()
    times = [1 - i / 12 for i in range(13)]
    v = flow(flux.mmdit, txt, pooled, 3.5, 16, 16)
    for i in range(4):                                     # from each kept state to the next
        z = euler(v, states[:, i], times[3 * i:3 * i + 4])
        assert (z - states[:, i + 1]).abs().mean() < 0.02  # they are kept in bfloat16


# --------------------------------------------------------------------------------------- kontext


def test_kontext_is_written_as_a_lora_and_edits_an_image(tmp_path, quick, tiny):
    train("kontext", tmp_path)
    flux = load(tmp_path / "kontext", device="cpu")
    assert flux.mmdit.config == tiny.mmdit.config and (tmp_path / "kontext" / "sheet.png").is_file()
    for one, other in ((flux.mmdit, tiny.mmdit), (flux.clip, tiny.clip), (flux.t5, tiny.t5)):
        changes = [(a - b).abs().max() for a, b in zip(one.parameters(), other.parameters())]
        assert 0 < max(changes) < 0.1                      # all three have learnt
    given = render(sample_scene(random.Random(1)))
    image, = kontext_edit(flux, "make the background red", given, steps=2, progress=False)
    assert image.size == (128, 128)


def test_what_an_edit_changes_weighs_four_times_as_much_as_what_it_leaves():
    """By hand: one pixel in the third token of the second row; all; nothing."""
    before = np.zeros((3, 128, 128, 3), np.uint8)
    after = before.copy()
    after[0, 16, 47, 1] = 9
    after[1] = 9
    one, everything, nothing = kontext.edit_weights(before, after)
    assert one.shape == (1, 16, 16) and float(one.mean()) == pytest.approx(1)
    assert (one[0, 2:4, 4:6] - 4 * 64 / 67).abs().max() < 1e-6                 # the token's 2x2
    assert (one == one[0, 0, 0]).sum() == 4 * 63
    assert (everything == 1).all() and (nothing == 1).all()
