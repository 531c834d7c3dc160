"""The vocabularies. Oracles: by hand; transformers on the files that are written."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import CLIPTokenizerFast, T5TokenizerFast

from miniflux.tiny.world.vocabulary import learn
from miniflux.tiny.world.words import OBJECTS
from miniflux.tokenizers import CLIPTokenizer, T5Tokenizer

PROMPTS = ["three cats on a blue background", "a t-rex, beside 2 owls", "an astronaut"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    learn(folder, 3000)
    return folder


def test_upper_case_is_read_as_lower_case(folder):
    for kind, name in ((CLIPTokenizer, "tokenizer"), (T5Tokenizer, "tokenizer_2")):
        tokenizer = kind.from_folder(folder / name)
        lower = tokenizer(PROMPTS, 32)
        assert torch.equal(tokenizer([prompt.upper() for prompt in PROMPTS], 32), lower)
        assert torch.equal(tokenizer([prompt.title() for prompt in PROMPTS], 32), lower)


def test_transformers_reads_the_files_alike(folder):
    for theirs, ours, name in ((CLIPTokenizerFast, CLIPTokenizer, "tokenizer"),
                               (T5TokenizerFast, T5Tokenizer, "tokenizer_2")):
        reference = theirs.from_pretrained(folder / name)
        for prompt in (*PROMPTS, "Four WHALES"):
            expected = reference(prompt).input_ids
            ids = ours.from_folder(folder / name)([prompt], 32)[0].tolist()
            assert ids[:len(expected)] == expected


def test_the_list_of_words_holds_every_object_and_no_unknown_word(folder):
    words = set(json.loads((folder / "words.json").read_text())["words"])
    assert set(OBJECTS) <= words and {"kitten", "beside", "watercolour", "make"} <= words
    assert not {"astronaut", "bicycle"} & words


def test_the_command_prints_the_words_without_the_font():
    code = ("import miniflux.tiny.world.glyphs as g; g.FONT_PATHS = (); "
            "import miniflux.tiny.world.listing as w; w.main()")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert all(name in printed for name in OBJECTS) and "beside" in printed
