"""The training loop and its stages. Oracles: by hand; and the finished folder, which `load` and `generate` must accept."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miniflux import generate, load
from miniflux.checkpoints.hub import SHIPPED
from miniflux.checkpoints.layouts import load_autoencoder
from miniflux.tiny import train as command
from miniflux.tiny import train_flow
from miniflux.tiny.train_flow import Painter, noisy, taken_over
from miniflux.tiny.training import learning_rate_factor, train
from miniflux.tokenizers import CLIPTokenizer, T5Tokenizer


def regression() -> tuple[nn.Module, object]:
    """A small network (with matrices for Muon and vectors for AdamW) that learns y = sin(x)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss_of(generator: torch.Generator):
        x = torch.randn(32, 1, generator=generator)
        with torch.enable_grad():
            return (net(x) - x.sin()).square().mean()

    return net, loss_of


def backward_enabled(function):
    def wrapped(*args, **kwargs):
        with torch.enable_grad():
            return function(*args, **kwargs)
    return wrapped


train = backward_enabled(train)                        # the suite runs without gradients


def test_the_loss_falls(tmp_path):
    net, loss_of = regression()
    train(net, loss_of, tmp_path, lr=1e-2, steps=200, log_every=20)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 5


def test_a_killed_run_resumes_exactly(tmp_path):
    """40 steps in one go, and 40 steps killed in step 27 and resumed from step 20, end in the same bits."""
    net, loss_of = regression()
    whole = train(net, loss_of, tmp_path / "whole", lr=1e-2, steps=40, save_every=20)
    net, loss_of = regression()
    calls = []

    def killed(generator):
        calls.append(1)
        if len(calls) == 27:
            raise KeyboardInterrupt
        return loss_of(generator)

    with pytest.raises(KeyboardInterrupt):
        train(net, killed, tmp_path / "parts", lr=1e-2, steps=40, save_every=20)
    net, loss_of = regression()
    resumed = train(net, loss_of, tmp_path / "parts", lr=1e-2, steps=40, save_every=20)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    states = [load_file(tmp_path / run / "state.safetensors") for run in ("whole", "parts")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_loss_that_explodes_stops_the_run_with_one_sentence(tmp_path):
    net, _ = regression()
    with pytest.raises(ValueError, match="the loss became inf at step 1: lower the learning rate"):
        train(net, lambda generator: net(torch.ones(1, 1)).sum() * torch.inf, tmp_path, lr=1e-2, steps=5, log_every=1)


def test_the_learning_rate_rises_stays_and_falls():
    assert learning_rate_factor(0.0, 0) == 0.01 and learning_rate_factor(0.4, 500) == 1.0
    assert learning_rate_factor(0.75, 500) == 0.5 and learning_rate_factor(1.0, 500) == 0.0


def test_a_noisy_picture_lies_on_the_line_from_data_to_noise():
    """By hand: x = (1 - t) z + t ε and v = ε - z, so x - t v = z."""
    z = torch.randn(3, 4, 64).bfloat16()
    x, t, v = noisy(z, torch.Generator().manual_seed(0))
    assert torch.allclose(x - t[:, None, None] * v, z.float(), atol=1e-5) and (0 < t).all() and (t < 1).all()


def test_two_steps_of_every_stage_end_in_a_folder_that_load_opens(tmp_path):
    """The pictures are noise; names, sizes, configs and vocabularies are those of a finished model."""
    with torch.enable_grad():
        command.main(["vocabulary", "--work", str(tmp_path), "--scenes", "3000"])
        for stage in ("autoencoder", "base", "guidance"):
            command.main([stage, "--work", str(tmp_path), "--steps", "2", "--scenes", "64", "--device", "cpu"])
            assert (tmp_path / stage / "sheet.png").is_file()
    flux = load(tmp_path / "model", device="cpu")
    assert flux.config.size == 128 and flux.config.max_text_tokens == 32
    picture, = generate(flux, "a red apple on a blue background", steps=1)
    assert picture.size == (128, 128)


@pytest.mark.parametrize("stage, missing", [("base", "train the stage vocabulary first"), ("guidance", "train the stage base first")])
def test_a_stage_without_the_one_before_says_what_is_missing(tmp_path, capsys, stage, missing):
    with pytest.raises(SystemExit) as stop:
        command.main([stage, "--work", str(tmp_path), "--steps", "1", "--device", "cpu"])
    assert stop.value.code == 2 and missing in capsys.readouterr().err


def test_a_larger_vocabulary_takes_over_the_pieces_that_both_know(tmp_path):
    """Whatever a caption of known words makes of the known model, it makes of the new one: the pieces moved with their vectors."""
    flux = load("tiny", device="cpu")
    command.main(["vocabulary", "--work", str(tmp_path), "--scenes", "3000"])
    clip, t5 = CLIPTokenizer.from_folder(tmp_path / "model" / "tokenizer"), T5Tokenizer.from_folder(tmp_path / "model" / "tokenizer_2")
    painter = Painter()
    painter.load_state_dict(taken_over(flux, clip, t5))
    caption = ["a cat on a red background"]
    assert not torch.equal(t5(caption, 32), flux.t5_tokenizer(caption, 32))
    txt, vec = painter.encode(clip(caption, 32), t5(caption, 32))
    assert torch.allclose(txt, flux.t5(flux.t5_tokenizer(caption, 32)), atol=1e-5)
    assert torch.allclose(vec, flux.clip(flux.clip_tokenizer(caption, 32)), atol=1e-5)


def test_a_minute_of_training_lowers_the_loss_and_a_killed_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    """The whole recipe of the base model on few scenes: the loss of a network that knows nothing is about 2."""
    def run(work, calls: int | None):
        def counted(net, loss_of, folder, **keywords):
            done = []

            def loss(generator):
                done.append(1)
                if calls and len(done) > calls:
                    raise KeyboardInterrupt
                with torch.enable_grad():
                    return loss_of(generator)
            return train(net, loss, folder, save_every=40, log_every=20, **keywords | {"on_save": None})
        monkeypatch.setattr(train_flow, "train", counted)
        for part in ("vae", "tokenizer", "tokenizer_2"):
            if not (work / "model" / part).is_dir():
                shutil.copytree(SHIPPED / "tiny" / part, work / "model" / part)
        with torch.enable_grad():
            command.main(["base", "--steps", "120", "--scenes", "96", "--work", str(work), "--device", "cpu"])

    monkeypatch.setattr(train_flow, "BATCH", 8)
    run(tmp_path / "whole", None)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "base" / "log.jsonl").read_text().splitlines()]
    assert losses[0] > 1.0 and losses[-1] < losses[0] / 1.5            # measured: 1.95 -> 1.07
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 90)
    run(tmp_path / "parts", None)
    whole, parts = (load_file(tmp_path / work / "base" / "state.safetensors") for work in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize("stage, start, sentence", [
    ("guidance", "tiny", "--start is for autoencoder and base"), ("base", "tiny-canny", "has another transformer than the one"),
    ("base", "no-such-model", "'no-such-model' is neither a folder nor a known model")])
def test_a_model_that_cannot_be_started_from_is_refused_in_one_sentence(tmp_path, capsys, stage, start, sentence):
    for part in ("vae", "tokenizer", "tokenizer_2"):
        shutil.copytree(SHIPPED / "tiny" / part, tmp_path / "model" / part)
    with pytest.raises(SystemExit) as stop:
        command.main([stage, "--start", start, "--steps", "1", "--scenes", "64", "--work", str(tmp_path), "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1


def test_an_autoencoder_that_is_started_from_another_keeps_its_encoder_and_its_latents(tmp_path):
    with torch.enable_grad():
        command.main(["autoencoder", "--start", "tiny", "--steps", "2", "--scenes", "64", "--work", str(tmp_path), "--device", "cpu"])
    known, new = (load_autoencoder(folder / "vae", "cpu", torch.float32) for folder in (SHIPPED / "tiny", tmp_path / "model"))
    assert new.config == known.config
    same = {name: torch.equal(value, known.state_dict()[name]) for name, value in new.state_dict().items()}
    assert all(equal for name, equal in same.items() if name.startswith("encoder.")) and not same["decoder.conv_out.weight"]
