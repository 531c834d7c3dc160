"""CLIP's tokenizer, against the `tokenizers` library and by hand."""

import re
import unicodedata

import torch
from tokenizer_texts import (
    OFFICIAL,
    assert_equal,
    assigned,
    clip_pipeline,
    each_code_point,
    mark_specials,
    official,
    strings,
    tiny_clip,
    without_newer_marks,
)
from tokenizers import models

from miniflux.tokenizers import CLIPTokenizer
from miniflux.tokenizers.bpe import END, START, split_clip
from miniflux.tokenizers.normalisation import normalise_clip


def reference_of(folder):
    """The fast tokenizer of the `tokenizers` library with the vocabulary of a folder."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    model = models.BPE.from_file(*files, unk_token=END, end_of_word_suffix="</w>")
    return mark_specials(clip_pipeline(model))


@official
def test_clip_equals_the_tokenizers_library_on_the_official_files(official_clip):
    """Oracle: the fast pipeline of the `tokenizers` library with the official vocabulary."""
    reference = reference_of(OFFICIAL / "tokenizer")
    assert_equal(official_clip, reference, without_newer_marks(strings(50_000, seed=1)))
    assert_equal(official_clip, reference, each_code_point())


def test_clip_equals_the_tokenizers_library_on_a_small_vocabulary(small_clip_folder):
    """Oracle: the fast pipeline of the `tokenizers` library.

    The vocabulary has other ids and many unknown symbols."""
    ours = CLIPTokenizer.from_folder(small_clip_folder)
    reference = reference_of(small_clip_folder)
    assert_equal(ours, reference, without_newer_marks(strings(50_000, seed=3)))


CLIP_EXAMPLES = {
    "A cat holding a sign that says hello world":
        [320, 2368, 5050, 320, 2292, 682, 1563, 3306, 1002],
    "": [],
    "Hello,  World's 2024 café!! 🙂":
        [3306, 267, 1002, 568, 273, 271, 273, 275, 15304, 748, 14860],
    "It's 10km—away…": [585, 568, 272, 271, 4590, 2005, 1520, 959],
    "a photo of 北京": [320, 1125, 539, 161, 234, 245, 21078, 361],
}


@official
def test_clip_gives_the_known_ids_of_the_examples(official_clip):
    """Oracle: golden numbers of the reference."""
    for text, ids in CLIP_EXAMPLES.items():
        assert official_clip.encode(text) == ids
        assert official_clip([text]).tolist() == [[49406] + ids + [49407] * (76 - len(ids))]


def test_special_ids_come_from_the_vocabulary():
    tokenizer = tiny_clip()
    assert tokenizer(["low"]).tolist() == [[0, tokenizer.vocab["low</w>"], 1, 1, 1, 1, 1, 1]]


def test_clip_truncation_keeps_the_end_token():
    tokenizer = tiny_clip()
    ids = tokenizer(["low " * 20, "low"])
    assert ids.shape == (2, 8)
    assert ids.dtype == torch.int64
    low = tokenizer.vocab["low</w>"]
    assert ids[0].tolist() == [0, *[low] * 6, 1]
    assert tokenizer(["low low"], length=2).tolist() == [[0, 1]]


def test_the_lowest_rank_is_merged_first_and_the_leftmost_of_equals():
    symbols = [START, END, "a", "a</w>", "aa", "aa</w>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    assert CLIPTokenizer(vocab, [("a", "a"), ("a", "a</w>")]).merge("aaa") == [4, 3]
    assert CLIPTokenizer(vocab, [("a", "a</w>"), ("a", "a")]).merge("aaa") == [2, 5]
    assert CLIPTokenizer(vocab, [("a", "a")]).merge("aaaa") == [4, 2, 3]


def test_numbers_are_split_digit_by_digit():
    pieces = ["in", "2", "0", "2", "4", "km", "²", "ⅷ", "½", "x"]
    assert split_clip(normalise_clip("in 2024 km² ⅷ½x")) == pieces


def test_special_tokens_typed_in_a_prompt_are_honoured_by_clip():
    """Note: the end token in capitals is ordinary text, the start token is not."""
    tokenizer = tiny_clip()
    low = tokenizer.vocab["low</w>"]
    prompt = "low<|endoftext|>low <|startoftext|> <|StartOfText|>"
    assert tokenizer.encode(prompt) == [low, 1, low, 0, 0]
    assert split_clip(normalise_clip("<|ENDOFTEXT|>!!")) == ["<|", "endoftext", "|>", "!!"]
    assert split_clip(normalise_clip("!<|ENDOFTEXT|>!!")) == ["!<|", "endoftext", "|>!!"]


def test_white_space_is_unicodes_and_not_pythons():
    """Oracle: Unicode's White_Space. Python's \\s has four more: U+001C to U+001F."""
    assert split_clip("a\x1cb\u2003c\x85d\u200be") == ["a", "\x1c", "b", "c", "d", "\u200b", "e"]


def test_python_word_characters_are_letters_numbers_and_the_underscore():
    """Oracle: the general categories L* and N*, by which the library's pattern is written."""
    for c in assigned():
        category = unicodedata.category(c)[0]
        assert bool(re.match(r"\w", c)) == (category in "LN" or c == "_")
        assert (c.isnumeric() and not c.isalpha()) == (category == "N")


def test_a_symbol_outside_of_the_vocabulary_is_the_end_token():
    assert CLIPTokenizer({START: 0, END: 1, "a</w>": 2}, []).encode("a b ba") == [2, 1, 1, 2]
