"""Added tokens. Oracle: the `tokenizers` library with the same tokens and rules."""

import json
import random
import shutil

import pytest
from tokenizer_texts import (
    PIECES,
    assert_equal,
    charsmap_of,
    clip_pipeline,
    copy,
    mark_specials,
    t5_pipeline,
)
from tokenizers import AddedToken as TheirToken
from tokenizers import models

from miniflux.tokenizers import CLIPTokenizer, T5Tokenizer
from miniflux.tokenizers.added_tokens import AddedToken
from miniflux.tokenizers.bpe import END

FLAGS = ("normalized", "single_word", "lstrip", "rstrip")
WORDS = ["<s0>", "<S0>", "<s1>", "sks", "SKS", " ", "  ", "\t", "low", "a", "sksa", "x<s0>y", "é",
         "two words", "two  words", "2<s1>", "_sks", "sks,", "<s0><s1>", END, "\u2003", "word"]


def texts(count: int) -> list[str]:
    draw = random.Random(3)
    result = []
    for _ in range(count):
        text = ""
        for _ in range(draw.randint(0, 7)):
            text += draw.choice(WORDS) + draw.choice(["", "", " "])
        result.append(text)
    return result


def random_tokens(seed: int) -> list[dict]:
    """Four added tokens with random rules."""
    draw = random.Random(seed)
    tokens = []
    for content in ("<s0>", "<s1>", "sks", "two words"):
        flags = {flag: draw.random() < 0.4 for flag in FLAGS}
        tokens.append({"content": content, **flags})
    return tokens


@pytest.mark.parametrize("seed", range(12))
def test_clip_finds_added_tokens_by_their_rules(small_clip_folder, tmp_path, seed):
    files = [str(small_clip_folder / name) for name in ("vocab.json", "merges.txt")]
    model = models.BPE.from_file(*files, unk_token=END, end_of_word_suffix="</w>")
    reference = mark_specials(clip_pipeline(model))
    tokens, size = random_tokens(seed), reference.get_vocab_size()
    reference.add_tokens([TheirToken(**token) for token in tokens])
    decoder = {str(size + i): token for i, token in enumerate(tokens)}
    folder = copy(small_clip_folder, tmp_path / "clip", added_tokens_decoder=decoder)
    assert_equal(CLIPTokenizer.from_folder(folder), reference, texts(2000))


@pytest.mark.parametrize("seed", range(12))
def test_t5_finds_added_tokens_by_their_rules(seed):
    pieces = [*PIECES, ("s", -4.0), ("k", -4.0), ("o", -5.0), ("w", -4.0), ("▁w", -6.0)]
    charsmap = charsmap_of(q="K")
    reference = t5_pipeline(pieces, charsmap)
    tokens = random_tokens(seed)
    reference.add_tokens([TheirToken(**token) for token in tokens])
    added = [AddedToken(piece, i) for i, (piece, _) in enumerate(PIECES[:3])]
    added += [AddedToken(id=len(pieces) + i, **token) for i, token in enumerate(tokens)]
    ours = T5Tokenizer(pieces, charsmap, added=added)
    assert_equal(ours, reference, [text for text in texts(2000) if END not in text])


def test_the_words_of_a_pivotal_tuning_are_read_from_every_file(small_clip_folder, tmp_path):
    """added_tokens.json alone, tokenizer_config.json alone; their ids follow the vocabulary."""
    size = len(json.loads((small_clip_folder / "vocab.json").read_text()))
    old = copy(small_clip_folder, tmp_path / "old")
    (old / "added_tokens.json").write_text(json.dumps({"<s0>": size, "<s1>": size + 1}))
    decoder = {str(size): {"content": "<s0>"}, str(size + 1): {"content": "<s1>"}}
    new = copy(small_clip_folder, tmp_path / "new", added_tokens_decoder=decoder)
    for folder in (old, new):
        tokenizer = CLIPTokenizer.from_folder(folder)
        assert tokenizer.encode("a <s0><S1>")[-2:] == [size, size + 1]
        assert max(tokenizer.vocab.values()) == size + 1


def test_a_word_of_several_vectors_is_all_of_them():
    """Oracle: diffusers' `maybe_convert_prompt`: "<s>" stands for "<s> <s>_1 <s>_2"."""
    added = [AddedToken("<s>", 8), AddedToken("<s>_1", 9), AddedToken("<s>_2", 10),
             AddedToken("<s>_4", 11)]
    tokenizer = T5Tokenizer(PIECES, added=added)
    assert tokenizer.encode("<s>")[-3:] == [8, 9, 10]


def test_a_typed_token_has_the_id_of_the_vocabulary(small_clip_folder, tmp_path):
    """A file cannot give another number to a token of the vocabulary; as in the library."""
    folder = copy(small_clip_folder, tmp_path / "a", added_tokens_decoder={"9": {"content": END}})
    tokenizer = CLIPTokenizer.from_folder(folder)
    assert tokenizer.encode(END) == [tokenizer.end]


@pytest.mark.parametrize("decoder", [
    {"x": {"content": "<s>"}},
    {"1": {}},
    {"1": 3},
    {"-1": {"content": "a"}},
    {"1": {"content": 3}},
    [1],
], ids=str)
def test_damaged_added_tokens_are_refused(small_clip_folder, tmp_path, decoder):
    folder = copy(small_clip_folder, tmp_path / "a", added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match="has damaged added tokens"):
        CLIPTokenizer.from_folder(folder)
    shutil.rmtree(folder)
