"""The stages of training. Oracles: by hand; the finished folder, which `load` and `generate` must
accept."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miniflux import generate, load
from miniflux.checkpoints.hub import SHIPPED
from miniflux.checkpoints.layouts import load_autoencoder
from miniflux.tiny.train import __main__ as command
from miniflux.tiny.train import autoencoder, base, loop
from miniflux.tiny.train.base import LENGTHS, Captions, JointModel, transfer_weights
from miniflux.tokenizers import CLIPTokenizer, T5Tokenizer


def run(*arguments) -> None:
    with torch.enable_grad():                              # the suite runs without gradients
        command.main([*map(str, arguments), "--device", "cpu"])


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ all stages


def test_two_steps_of_every_stage_end_in_a_folder_that_load_opens(tmp_path):
    """The images are noise; names, sizes, configs and vocabularies are those of a finished
    model."""
    run("vocabulary", "--work", tmp_path, "--scenes", 3000)
    for stage in ("autoencoder", "base", "guidance"):
        run(stage, "--work", tmp_path, "--steps", 2, "--scenes", 64)
        assert (tmp_path / stage / "sheet.png").is_file()
    flux = load(tmp_path / "model", device="cpu")
    assert flux.config.size == 128 and flux.config.max_text_tokens == 32
    picture, = generate(flux, "a red apple on a blue background", steps=1)
    assert picture.size == (128, 128)


@pytest.mark.parametrize("stage, missing", [
    ("base", "train the stage vocabulary first"), ("guidance", "train the stage base first"),
    ("status", "no stage of training was started")])
def test_a_stage_without_the_one_before_is_refused(tmp_path, capsys, stage, missing):
    with pytest.raises(SystemExit) as stop:
        run(stage, "--work", tmp_path, "--steps", 1)
    assert stop.value.code == 2 and missing in capsys.readouterr().err


def test_a_stopped_stage_prints_how_far_it_is_and_how_it_is_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(base, "BATCH", 4)
    real, calls = base.flow_matching_loss, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(base, "flow_matching_loss", stopped)
    with pytest.raises(SystemExit) as stop:
        run("base", "--start", "tiny", "--steps", 50, "--scenes", 8, "--work", tmp_path)
    assert stop.value.code == 130
    stopped_line = capsys.readouterr().err.splitlines()[-1]
    run("status", "--work", tmp_path)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("base: 2 of 50 steps, loss ") and line in stopped_line
    assert line.split("resume: ")[1].startswith("python -m miniflux.tiny.train base --start tiny")


# ----------------------------------------------------------------------------------- autoencoder


def test_every_crop_contains_an_object_and_most_begin_on_the_grid():
    rng = autoencoder.random.Random(0)
    mask = np.zeros((128, 128), bool)
    mask[100:104, 3:7] = True
    crops = [autoencoder.crop_around_object(mask, rng) for _ in range(200)]
    assert all(mask[crop].any() and mask[crop].shape == (64, 64) for crop in crops)
    assert sum(y.start % 8 == x.start % 8 == 0 for y, x in crops) > 100


def test_object_pixels_weigh_three_times_as_much():
    """By hand: the same error on one pixel of an object, and on one of the ground."""
    x, mask = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    losses = []
    for row in (1, 6):
        y = x.clone()
        y[:, :, row, 4] = 0.5
        losses.append(float(autoencoder.reconstruction_loss(y, x, mask)))
    assert losses[0] == pytest.approx(3 * losses[1], rel=1e-5)
    assert autoencoder.reconstruction_loss(x, x, mask) == 0


def test_the_signal_to_noise_ratio_can_be_that_of_the_objects_alone():
    """By hand: an error of 0.2 on a quarter of the pixels, all of them the object's."""
    x, mask = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :2] = True
    y = x + 0.2 * mask[:, None]
    assert autoencoder.psnr(y, x, mask) == pytest.approx(20, abs=1e-4)          # 10 log10(4 / 0.04)
    assert autoencoder.psnr(y, x) == pytest.approx(20 + 10 * np.log10(4), abs=1e-4)


def test_a_decoder_alone_keeps_the_encoder_and_its_latents(tmp_path):
    run("autoencoder", "--start", "tiny", "--decoder-only", "--steps", 2, "--scenes", 64,
        "--work", tmp_path)
    known, new = (load_autoencoder(folder / "vae", "cpu", torch.float32)
                  for folder in (SHIPPED / "tiny", tmp_path / "model"))
    assert new.config == known.config
    before, after = known.state_dict(), new.state_dict()
    encoder = [name for name in after if name.startswith("encoder.")]
    assert all(torch.equal(after[name], before[name]) for name in encoder)
    assert not torch.equal(after["decoder.conv_out.weight"], before["decoder.conv_out.weight"])
    assert "psnr of objects" in entries(tmp_path / "autoencoder")[-1]


# ------------------------------------------------------------------------------------------ base


def test_a_batch_of_captions_has_one_length_and_cuts_none():
    flux = load("tiny", device="cpu")
    texts = ["a cat", "a red apple to the left of a cat on a green background",
             "a black and white picture of a pineapple, a strawberry, a watermelon and an elephant"]
    captions = Captions(40 * texts, flux.clip_tokenizer, flux.t5_tokenizer)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        index, clip_ids, t5_ids = captions.draw(16, generator)
        length = t5_ids.shape[1]
        assert length in LENGTHS and clip_ids.shape == t5_ids.shape == (16, length)
        seen.add(length)
        for i, row in zip(index.tolist(), t5_ids):
            whole = captions.t5_ids[i]
            assert (whole[length:] == 0).all()             # nothing but padding
            dropped = torch.equal(row, captions.t5_ids[-1, :length])
            assert dropped or torch.equal(row, whole[:length])
    assert seen == set(LENGTHS)


def test_a_few_captions_are_dropped():
    flux = load("tiny", device="cpu")
    captions = Captions(["a cat"], flux.clip_tokenizer, flux.t5_tokenizer)
    _, _, t5_ids = captions.draw(2000, torch.Generator().manual_seed(0))
    empty = (t5_ids == captions.empty(1, t5_ids.shape[1])[1]).all(1)
    assert 0.07 < float(empty.float().mean()) < 0.13


def test_scenes_are_renewed_after_some_epochs(monkeypatch):
    """8 scenes, 4 a step, one pass: others from step 2 on, again from step 4 on."""
    monkeypatch.setattr(base, "BATCH", 4)
    monkeypatch.setattr(base, "EPOCHS", 1)
    flux, seeds = load("tiny", device="cpu"), []
    real = base.encode_base
    monkeypatch.setattr(base, "encode_base",
                        lambda flux, count, seed: seeds.append(seed) or real(flux, count, seed))
    data, latents = base.RenewedScenes(flux, 8, seed=10), []
    for step in range(5):
        data.renew(step)
        latents.append(data.latents)
    assert seeds == [10, 1010, 2010]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[1], latents[2])
    z, clip_ids, t5_ids = data.draw(torch.Generator().manual_seed(0), torch.device("cpu"))
    assert z.shape == (4, 16, 16, 16) and len(clip_ids) == len(t5_ids) == 4


def test_a_larger_vocabulary_keeps_the_vectors_of_shared_pieces(tmp_path):
    """What the known model makes of a caption of known words, the new one makes of it."""
    flux = load("tiny", device="cpu")
    run("vocabulary", "--work", tmp_path, "--scenes", 3000)
    clip = CLIPTokenizer.from_folder(tmp_path / "model" / "tokenizer")
    t5 = T5Tokenizer.from_folder(tmp_path / "model" / "tokenizer_2")
    model = JointModel()
    model.load_state_dict(transfer_weights(flux, clip, t5))
    caption = ["a cat on a red background"]
    assert not torch.equal(t5(caption, 32), flux.t5_tokenizer(caption, 32))
    txt, pooled = model.encode(clip(caption, 32), t5(caption, 32))
    assert torch.allclose(txt, flux.t5(flux.t5_tokenizer(caption, 32)), atol=1e-5)
    assert torch.allclose(pooled, flux.clip(flux.clip_tokenizer(caption, 32)), atol=1e-5)


def test_a_minute_of_training_lowers_the_loss(tmp_path, monkeypatch):
    """The whole recipe of the base model on few scenes: the loss of a network that knows nothing is
    about 2."""
    monkeypatch.setattr(base, "BATCH", 8)
    monkeypatch.setattr(base, "train",
                        lambda *args, on_save, **keywords: loop.train(*args, **keywords))
    for part in ("vae", "tokenizer", "tokenizer_2"):
        shutil.copytree(SHIPPED / "tiny" / part, tmp_path / "model" / part)
    run("base", "--steps", 120, "--scenes", 96, "--work", tmp_path)
    losses = [entry["loss"] for entry in entries(tmp_path / "base")]
    assert losses[0] > 1.5 and losses[-1] < losses[0] / 1.5


def test_a_base_that_starts_from_a_model_needs_no_stage_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BATCH", 4)
    run("base", "--start", "tiny", "--steps", 1, "--scenes", 8, "--work", tmp_path)
    known, new = load("tiny", device="cpu"), load(tmp_path / "model", device="cpu")
    change = new.mmdit.img_in.weight - known.mmdit.img_in.weight
    assert 0 < change.abs().max() < 0.01
    a, b = (load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
            for folder in (SHIPPED / "tiny", tmp_path / "model"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage, start, sentence", [
    ("guidance", "tiny", "--start is for autoencoder and base"),
    ("base", "tiny-canny", "has another transformer than the one"),
    ("base", "no-such-model", "'no-such-model' is neither a folder nor a known model")])
def test_a_model_that_cannot_be_started_from_is_refused(tmp_path, capsys, stage, start, sentence):
    for part in ("vae", "tokenizer", "tokenizer_2"):
        shutil.copytree(SHIPPED / "tiny" / part, tmp_path / "model" / part)
    with pytest.raises(SystemExit) as stop:
        run(stage, "--start", start, "--steps", 1, "--scenes", 64, "--work", tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1
