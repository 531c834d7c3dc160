"""Prompts: what is encoded, how copies are ordered, what is refused. Oracle: by hand."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from miniflux import Prompt, encode_prompt, generate, load
from miniflux.prompt import cut_off, repeat_negative, repeat_prompt


@pytest.fixture(scope="module")
def flux(small_folder):
    return load(small_folder, device="cpu")


def test_a_prompt_in_a_list_is_encoded_as_alone(flux):
    both = encode_prompt(flux, ["a red apple", "two blue cats"], 16)
    alone = encode_prompt(flux, "two blue cats", 16)
    assert len(both) == 2
    assert both.txt.shape[:2] == (2, 16)
    assert torch.allclose(both.txt[1], alone.txt[0], atol=1e-5)
    assert torch.allclose(both.pooled[1], alone.pooled[0], atol=1e-5)


def test_the_default_length_is_the_models(flux):
    """512 tokens for dev, 256 for schnell."""
    expected = 512 if flux.mmdit.config.guidance_embed else 256
    assert encode_prompt(flux, "").txt.shape[1] == expected


def test_an_encoded_prompt_passes_through_unchanged(flux):
    prompt = encode_prompt(flux, "a red apple", 16)
    assert torch.equal(encode_prompt(flux, prompt).txt, prompt.txt)


def test_copies_lie_side_by_side():
    two = Prompt(txt=torch.tensor([[[0.0]], [[1.0]]]), pooled=torch.tensor([[0.0], [1.0]]))
    prompt = repeat_prompt(two, 2)
    assert prompt.txt.flatten().tolist() == [0, 0, 1, 1]
    assert prompt.pooled.flatten().tolist() == [0, 0, 1, 1]


def test_one_negative_prompt_serves_all_images():
    negative = Prompt(torch.zeros(1, 3, 2), torch.zeros(1, 2))
    assert len(repeat_negative(negative, 4)) == 4
    with pytest.raises(ValueError, match="2 negative prompts for 3 images"):
        repeat_negative(repeat_prompt(negative, 2), 3)


@pytest.mark.parametrize("prompt", [3, None, [], ["a", 3], b"bytes"])
def test_a_prompt_that_is_not_text_is_refused(flux, prompt):
    sentence = "the prompt must be a string, a list of strings or a Prompt"
    with pytest.raises(ValueError, match=sentence):
        encode_prompt(flux, prompt)


@pytest.mark.parametrize("tokens", [0, -1, 513, 2.5, "all", True])
def test_more_text_tokens_than_the_model_reads_are_refused(flux, tokens):
    with pytest.raises(ValueError, match="this model reads 1 to (512|256) tokens"):
        encode_prompt(flux, "a", tokens)


def test_a_prompt_of_another_model_is_refused(flux):
    with pytest.raises(ValueError, match="widths 5 and 7, this model needs 32 and 24"):
        encode_prompt(flux, Prompt(torch.zeros(1, 4, 5), torch.zeros(1, 7)))


def test_a_prompt_that_is_cut_is_logged_once_with_what_was_cut(flux, caplog):
    """Oracle: the tokenizer: what is left fits, and one character more does not."""
    text = "a red apple " * 20 + "in the rain"
    encode_prompt(flux, [text, text, "short"], 16)
    record, = caplog.records
    assert record.levelname == "WARNING"
    assert "longer than the 16 tokens" in record.message
    assert record.message.endswith("in the rain'")

    tokenize = flux.t5_tokenizer.encode
    lost = cut_off(text, tokenize, 15)
    kept = text.removesuffix(lost)
    assert kept + lost == text
    assert len(tokenize(kept.rstrip())) <= 15
    assert len(tokenize(kept + lost[0])) > 15

    longer = encode_prompt(flux, text + " or at night", 16)
    assert torch.equal(encode_prompt(flux, text, 16).txt, longer.txt)


def test_a_prompt_that_only_clip_cuts_is_a_note(flux, caplog):
    caplog.set_level("INFO")
    encode_prompt(flux, "apple " * 100 + "owl", 256)
    record, = caplog.records
    assert record.levelname == "INFO"
    assert "CLIP" in record.message
    assert "T5 reads all of it" in record.message


def test_a_prompt_that_fits_is_not_logged(flux, caplog):
    caplog.set_level("INFO")
    encode_prompt(flux, "a red apple", 16)
    assert not caplog.records


# ------------------------------------------------------------------------- kept on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_prompt_is_read_back_bit_for_bit_and_needs_no_text_encoders(
        flux, tmp_path, dtype):
    prompt = encode_prompt(flux, ["a red apple", "two blue cats"], 16)
    prompt = Prompt(prompt.txt.to(dtype), prompt.pooled.to(dtype))
    prompt.save(tmp_path / "prompt.safetensors")
    again = Prompt.load(tmp_path / "prompt.safetensors")
    assert again.txt.dtype == dtype
    assert torch.equal(again.txt, prompt.txt)
    assert torch.equal(again.pooled, prompt.pooled)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]  # no partial file
    bare = replace(flux, clip=None, t5=None, clip_tokenizer=None, t5_tokenizer=None)
    keywords = dict(width=32, height=32, steps=1, output="latents", progress=False)
    assert torch.equal(generate(bare, again, **keywords), generate(flux, prompt, **keywords))


def test_a_prompt_that_was_saved_when_pooled_was_called_vec_is_read(tmp_path):
    path = tmp_path / "old.safetensors"
    vec = torch.full((1, 3), 2.0)
    save_file({"txt": torch.ones(1, 2, 3), "vec": vec}, path)
    assert torch.equal(Prompt.load(path).pooled, vec)


def test_a_prompt_in_use_survives_its_file(tmp_path):
    Prompt(torch.ones(1, 2, 3), torch.ones(1, 3)).save(tmp_path / "prompt.safetensors")
    prompt = Prompt.load(str(tmp_path / "prompt.safetensors"))
    (tmp_path / "prompt.safetensors").write_bytes(b"")
    assert prompt.txt.sum() == 6


@pytest.mark.parametrize("tensors, message", [
    ({"txt": torch.ones(1, 2, 3)},
     "holds no encoded prompt: expected txt and pooled, as Prompt.save writes them"),
    ({"txt": torch.ones(1, 2, 3), "vec": torch.ones(1, 3), "more": torch.ones(1)},
     "holds no encoded prompt"),
    ({"txt": torch.ones(1, 2, 3).int(), "vec": torch.ones(1, 3)},
     "holds no encoded prompt"),
    ({"txt": torch.ones(2, 3), "vec": torch.ones(1, 3)},
     r"a Prompt has txt \(B, L, width\) and pooled"),
    (None, "is not a complete safetensors file"),
])
def test_another_file_is_refused_in_one_sentence(tmp_path, tensors, message):
    path = tmp_path / "prompt.safetensors"
    save_file(tensors, path) if tensors else path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=message):
        Prompt.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Prompt.load(tmp_path / "nowhere.safetensors")


def test_a_prompt_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    prompt = Prompt(torch.ones(1, 2, 3), torch.ones(1, 3))
    with pytest.raises(FileNotFoundError, match="cannot be written: its folder does not exist"):
        prompt.save(tmp_path / "nowhere" / "prompt.safetensors")
    assert not list(tmp_path.iterdir())
