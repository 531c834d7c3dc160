"""The training of Redux for the tiny model. Oracles: by hand; transformers and diffusers on the folder that is written."""

import math
import random

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file
from transformers import SiglipVisionModel

from miniflux import load, redux
from miniflux.redux import redux_prompt
from miniflux.tiny import evaluate_variant, train, train_redux
from miniflux.tiny.export import write_redux
from miniflux.tiny.scenes import KINDS, render, sample_scene
from miniflux.tiny.train_redux import Pairing, Reader, moved, sigmoid_loss
from miniflux.tiny.vocabulary import write_json


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("BATCH", 4), ("SHOWN", 1)):
        monkeypatch.setattr(train_redux, name, value)


def stage(work, steps: int = 3) -> None:
    with torch.enable_grad():
        train.main(["redux", "--steps", str(steps), "--scenes", "6", "--work", str(work), "--device", "cpu"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, as the stage would write them."""
    torch.manual_seed(0)
    reader, path = Reader(128), tmp_path_factory.mktemp("redux")
    write_redux(path, reader.siglip, reader.redux)
    write_json(path / "variant.json", {"base": "tiny"})
    return path


def test_the_sigmoid_loss_asks_for_the_diagonal():
    """By hand: -log sigmoid(z) = log(1 + exp(-z)), of the own captions' logits and of minus the others', summed, for each picture."""
    logits = torch.tensor([[2.0, -1.0], [0.5, -3.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(3))) / 2
    assert float(sigmoid_loss(logits)) == pytest.approx(expected, rel=1e-6)


def test_the_logits_are_cosines_with_a_scale_and_a_bias():
    net, pictures, vec = Pairing(128), torch.randn(3, 3, 128, 128), torch.randn(3, 128)
    x, y = net.picture_map(net.siglip(pictures).mean(1)), net.text_map(vec)
    expected = 10 * float(x[2] @ y[1] / x[2].norm() / y[1].norm()) - math.log(train_redux.BATCH)
    assert float(net(pictures, vec)[2, 1]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_that_is_moved_keeps_its_facts_and_stays_in_the_picture(kind):
    rng = random.Random(1)
    for _ in range(20):
        scene = sample_scene(rng, kind=kind)
        other = moved(scene, rng)
        assert [(o.name, o.colour, o.size) for o in other.objects] == [(o.name, o.colour, o.size) for o in scene.objects]
        assert (other.caption, other.ground, other.style) == (scene.caption, scene.ground, scene.style) and other.seed != scene.seed
        assert len({(o.x - p.x, o.y - p.y) for o, p in zip(other.objects, scene.objects)}) == 1
        assert all(0 <= o.x <= 128 - o.size and 0 <= o.y <= 128 - o.size for o in other.objects)


def test_three_steps_end_in_a_folder_that_load_opens_and_redux_paints_with(tmp_path, quick):
    stage(tmp_path)
    flux, base = load(tmp_path / "redux", device="cpu"), load("tiny", device="cpu")
    assert flux.config.name == "redux" and (tmp_path / "redux" / "sheet.png").is_file()
    assert all(torch.equal(value, base.mmdit.state_dict()[name]) for name, value in flux.mmdit.state_dict().items())
    one, other = (render(sample_scene(random.Random(seed))) for seed in (1, 2))
    assert redux_prompt(flux, one).txt.shape == (1, 32 + 64, 128)
    assert not np.array_equal(redux(flux, one, steps=1, progress=False)[0], redux(flux, other, steps=1, progress=False)[0])


def test_transformers_and_diffusers_read_the_folder_alike(folder):
    """In float32, of the bfloat16 weights."""
    flux, pictures = load(folder, device="cpu"), torch.randn(2, 3, 128, 128)
    tower = SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()
    embedder = ReduxImageEncoder.from_pretrained(folder / "image_embedder", torch_dtype=torch.float32).eval()
    tokens = flux.siglip(pictures)
    assert tokens.shape == (2, 64, 128) and (tokens - tower(pictures).last_hidden_state).abs().max() <= 2e-5
    assert (flux.redux(tokens) - embedder(tokens).image_embeds).abs().max() <= 2e-5


def test_a_stage_killed_in_either_step_goes_on_there_to_the_same_bits(tmp_path, quick, monkeypatch):
    """Killed once while SigLIP learns and once while the embedder does, and run again each time."""
    stage(tmp_path / "whole", 6)
    real = train_redux.train

    def killed(step):
        def until(net, loss_of, folder, **keywords):
            calls = []

            def loss(generator):
                calls.append(1)
                if folder.name == step and len(calls) > 1:
                    raise KeyboardInterrupt
                return loss_of(generator)
            return real(net, loss, folder, save_every=1, **keywords)
        return until

    for step in ("siglip", "embedder"):
        monkeypatch.setattr(train_redux, "train", killed(step))
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "parts", 6)
    monkeypatch.setattr(train_redux, "train", real)
    stage(tmp_path / "parts", 6)
    for file in ("image_encoder/model.safetensors", "image_embedder/diffusion_pytorch_model.safetensors"):
        whole, parts = (load_file(tmp_path / work / "redux" / file) for work in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_variant_without_redux_and_without_a_lora_is_refused(tmp_path):
    write_json(tmp_path / "variant.json", {"base": "tiny"})
    with pytest.raises(FileNotFoundError, match="lora.safetensors"):
        load(tmp_path, device="cpu")


def test_variations_are_measured_beside_the_true_scenes(folder):
    """Untrained, so it cannot be good."""
    figures, pictures = evaluate_variant.measure_variations(load(folder, device="cpu"), 4, steps=1)
    assert pictures.shape == (4, 128, 128, 3) and len(figures) == 6
    assert figures["object right, at best"] >= 0.5 > figures["object right"] and figures["ground right, at best"] == 1
    with pytest.raises(SystemExit):
        evaluate_variant.main(["redux", "--model", "tiny", "--pictures", "1"])
