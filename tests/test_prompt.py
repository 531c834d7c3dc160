"""Prompts: what is encoded, how copies are ordered, what is refused. Oracle: by hand."""

import pytest
import torch

from miniflux import Prompt, encode_prompt, load
from miniflux.prompt import match, repeat


@pytest.fixture(scope="module")
def flux(small_folder):
    return load(small_folder, device="cpu")


def test_a_prompt_in_a_list_is_encoded_as_alone(flux):
    both = encode_prompt(flux, ["a red apple", "two blue cats"], 16)
    alone = encode_prompt(flux, "two blue cats", 16)
    assert both.txt.shape[:2] == (2, 16) and len(both) == 2
    assert torch.allclose(both.txt[1], alone.txt[0], atol=1e-5) and torch.allclose(both.vec[1], alone.vec[0], atol=1e-5)


def test_the_default_length_is_the_models(flux):
    """512 tokens for dev, 256 for schnell."""
    assert encode_prompt(flux, "").txt.shape[1] == (512 if flux.mmdit.config.guidance_embed else 256)


def test_an_encoded_prompt_passes_through_unchanged(flux):
    prompt = encode_prompt(flux, "a red apple", 16)
    assert torch.equal(encode_prompt(flux, prompt).txt, prompt.txt)


def test_copies_lie_side_by_side():
    prompt = repeat(Prompt(torch.arange(2.0).reshape(2, 1, 1), torch.arange(2.0).reshape(2, 1)), 2)
    assert prompt.vec.flatten().tolist() == prompt.txt.flatten().tolist() == [0, 0, 1, 1]


def test_one_negative_prompt_serves_all_pictures():
    negative = Prompt(torch.zeros(1, 3, 2), torch.zeros(1, 2))
    assert len(match(negative, 4)) == 4
    with pytest.raises(ValueError, match="2 negative prompts for 3 pictures"):
        match(repeat(negative, 2), 3)


@pytest.mark.parametrize("prompt", [3, None, [], ["a", 3], b"bytes"])
def test_a_prompt_that_is_not_text_is_refused(flux, prompt):
    with pytest.raises(ValueError, match="the prompt must be a string, a list of strings or a Prompt"):
        encode_prompt(flux, prompt)


@pytest.mark.parametrize("tokens", [0, -1, 513, 2.5, "all", True])
def test_more_text_tokens_than_the_model_reads_are_refused(flux, tokens):
    with pytest.raises(ValueError, match="this model reads 1 to (512|256) tokens"):
        encode_prompt(flux, "a", tokens)


def test_a_prompt_of_another_model_is_refused(flux):
    with pytest.raises(ValueError, match="widths 5 and 7, this model needs 32 and 24"):
        encode_prompt(flux, Prompt(torch.zeros(1, 4, 5), torch.zeros(1, 7)))
