"""Saving a model as a folder. Oracles: `load`, bit for bit; the reference libraries."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTokenizer as TheirCLIPTokenizer
from transformers import T5Tokenizer as TheirT5Tokenizer

from miniflux import load, quantize, save
from miniflux.checkpoints.names import autoencoder_from_diffusers, mmdit_from_diffusers
from miniflux.flux import Schedule
from miniflux.tokenizers import T5Tokenizer
from miniflux.tokenizers.saving import write_t5_tokenizer

NETWORKS = ("mmdit", "autoencoder", "clip", "t5")
TEXTS = ["a fox next to 2 red apples", "It's 10km!!", "", "<|endoftext|> low", "  two   spaces "]


def test_a_saved_model_is_loaded_as_it_was(small_folder, tmp_path):
    flux = load(small_folder, device="cpu")
    save(flux, tmp_path / small_folder.name)
    again = load(tmp_path / small_folder.name, device="cpu")
    assert again.config == flux.config
    for part in NETWORKS:
        old, new = getattr(flux, part), getattr(again, part)
        assert new.config == old.config
        assert all(
            torch.equal(tensor, new.state_dict()[key]) for key, tensor in old.state_dict().items()
        )
    for part in ("clip_tokenizer", "t5_tokenizer"):
        old, new = getattr(flux, part), getattr(again, part)
        assert new(TEXTS).tolist() == old(TEXTS).tolist() and new.max_length == old.max_length
    assert not list(tmp_path.rglob("*.part"))


def test_diffusers_and_transformers_read_a_saved_model(tmp_path):
    flux = load("tiny", device="cpu")
    save(flux, tmp_path)
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(tensor, flux.mmdit.state_dict()[name])
               for name, tensor in mmdit_from_diffusers(theirs).items())
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(tensor, flux.autoencoder.state_dict()[name])
               for name, tensor in autoencoder_from_diffusers(theirs).items())
    for kind, name, ours in ((TheirCLIPTokenizer, "tokenizer", flux.clip_tokenizer),
                             (TheirT5Tokenizer, "tokenizer_2", flux.t5_tokenizer)):
        theirs = kind.from_pretrained(tmp_path / name)
        keywords = dict(padding="max_length", truncation=True, max_length=ours.max_length)
        assert ours(TEXTS).tolist() == theirs(TEXTS, **keywords).input_ids


def test_the_schedule_is_saved_with_the_model(tmp_path):
    schedule = Schedule(spacing="karras", shift_terminal=0.1, base_shift=0.8)
    flux = load("tiny", device="cpu", schedule=schedule)
    save(flux, tmp_path, torch.bfloat16)
    again = load(tmp_path, device="cpu")
    assert again.config.schedule == schedule
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert theirs.config.use_karras_sigmas and theirs.config.base_shift == 0.8


def test_parts_that_are_not_there_are_left_out(tmp_path):
    flux = replace(load("tiny", device="cpu"), t5=None, autoencoder=None)
    save(flux, tmp_path, torch.bfloat16)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == [None, None] and index["transformer"][1] == "FluxTransformer2DModel"
    assert not (tmp_path / "vae").exists() and load(tmp_path, device="cpu").t5 is None


def test_a_quantised_model_is_not_saved(tmp_path):
    with pytest.raises(
        ValueError, match="the MMDiT has been changed .*: save the model as it was before"
    ):
        save(quantize(load("tiny", device="cpu"), "int8"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_of_transformers_5_is_saved_with_its_rules(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0)]
    tokenizer = T5Tokenizer(pieces, prepend_always=True, pad="</s>")
    write_t5_tokenizer(tmp_path, tokenizer)
    again = T5Tokenizer.from_folder(tmp_path)
    assert again.prepend_always and again.pad == tokenizer.pad
    assert again.encode("a</s>a  a") == tokenizer.encode("a</s>a  a")
