"""The training of Redux for the tiny model. Oracles: by hand; transformers and diffusers on the
folder that is written."""

import random

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file
from transformers import SiglipVisionModel

from miniflux import load, redux
from miniflux.checkpoints.saving import write_json
from miniflux.redux import redux_prompt
from miniflux.tiny.export import write_redux
from miniflux.tiny.measure import evaluate_variant
from miniflux.tiny.train import __main__ as command
from miniflux.tiny.train import redux as train_redux
from miniflux.tiny.train import towers
from miniflux.tiny.train.redux import ReduxReader
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene


@pytest.fixture
def quick(monkeypatch):
    for module, name, value in (
        (towers, "BATCH", 4),
        (train_redux, "BATCH", 4),
        (train_redux, "SHOWN", 1),
    ):
        monkeypatch.setattr(module, name, value)


def stage(work, steps: int = 3) -> None:
    with torch.enable_grad():
        command.main(
            [
                "redux",
                "--steps",
                str(steps),
                "--scenes",
                "6",
                "--work",
                str(work),
                "--device",
                "cpu",
            ]
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, as the stage would write them."""
    torch.manual_seed(0)
    reader, path = ReduxReader(128), tmp_path_factory.mktemp("redux")
    write_redux(path, reader.siglip, reader.redux)
    write_json(path / "variant.json", {"base": "tiny"})
    return path


def test_three_steps_end_in_a_folder_that_load_opens_and_redux_paints_with(tmp_path, quick):
    stage(tmp_path)
    flux, base = load(tmp_path / "redux", device="cpu"), load("tiny", device="cpu")
    assert flux.config.name == "redux" and (tmp_path / "redux" / "sheet.png").is_file()
    assert all(
        torch.equal(value, base.mmdit.state_dict()[name])
        for name, value in flux.mmdit.state_dict().items()
    )
    one, other = (render(sample_scene(random.Random(seed))) for seed in (1, 2))
    assert redux_prompt(flux, one).txt.shape == (1, 32 + 64, 128)
    assert not np.array_equal(
        redux(flux, one, steps=1, progress=False)[0], redux(flux, other, steps=1, progress=False)[0]
    )


def test_transformers_and_diffusers_read_the_folder_alike(folder):
    """In float32, of the bfloat16 weights."""
    flux, pictures = load(folder, device="cpu"), torch.randn(2, 3, 128, 128)
    tower = SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()
    embedder = ReduxImageEncoder.from_pretrained(
        folder / "image_embedder", torch_dtype=torch.float32
    ).eval()
    tokens = flux.siglip(pictures)
    assert (
        tokens.shape == (2, 64, 128)
        and (tokens - tower(pictures).last_hidden_state).abs().max() <= 2e-5
    )
    assert (flux.redux(tokens) - embedder(tokens).image_embeds).abs().max() <= 2e-5


def test_a_stage_killed_in_any_step_goes_on_there_to_the_same_bits(tmp_path, quick, monkeypatch):
    """Killed while SigLIP learns, while the embedder learns words, and while it learns to be
    understood; run again each time."""
    stage(tmp_path / "whole", 8)
    real = towers.train

    def train_with(function):
        for module in (towers, train_redux):
            monkeypatch.setattr(module, "train", function)

    def killed(step):
        def until(net, loss_of, folder, **keywords):
            calls = []

            def loss(generator):
                calls.append(1)
                if folder.name == step and len(calls) > 1:
                    raise KeyboardInterrupt
                return loss_of(generator)

            return real(net, loss, folder, save_minutes=0, **keywords)

        return until

    for step in ("siglip", "words", "images"):
        train_with(killed(step))
        with pytest.raises(SystemExit, match="130"):
            stage(tmp_path / "parts", 8)
    train_with(real)
    stage(tmp_path / "parts", 8)
    for file in (
        "image_encoder/model.safetensors",
        "image_embedder/diffusion_pytorch_model.safetensors",
    ):
        whole, parts = (load_file(tmp_path / work / "redux" / file) for work in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(
            torch.equal(whole[name], parts[name]) for name in whole
        )


def test_a_variant_without_redux_and_without_a_lora_is_refused(tmp_path):
    write_json(tmp_path / "variant.json", {"base": "tiny"})
    with pytest.raises(FileNotFoundError, match="lora.safetensors"):
        load(tmp_path, device="cpu")


def test_variations_are_measured_beside_the_true_scenes(folder):
    """Untrained, so it cannot be good."""
    figures, pictures = evaluate_variant.measure_variations(load(folder, device="cpu"), 4, steps=1)
    assert pictures.shape == (4, 128, 128, 3) and len(figures) == 6
    assert (
        figures["object right, at best"] >= 0.5 > figures["object right"]
        and figures["ground right, at best"] == 1
    )
    with pytest.raises(SystemExit):
        evaluate_variant.main(["redux", "--model", "tiny", "--pictures", "1"])
