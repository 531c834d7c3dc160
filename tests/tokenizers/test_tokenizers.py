"""What holds for both tokenizers."""

import copy
import doctest
import pickle
import weakref

import pytest
from tokenizer_texts import (
    PIECES,
    official,
    tiny_clip,
)

from miniflux.tokenizers import (
    CLIPTokenizer,
    T5Tokenizer,
    added_tokens,
    bpe,
    files,
    normalisation,
    pixtral,
    unigram,
)


def test_the_examples_in_the_docstrings_hold():
    for module in (added_tokens, bpe, files, normalisation, pixtral, unigram):
        assert doctest.testmod(module).failed == 0


@official
def test_the_official_vocabularies_have_the_known_layout(official_clip, official_t5):
    assert len(official_clip.vocab) == 49408
    assert official_clip.start == 49406
    assert official_clip.end == 49407
    assert official_clip.max_length == 77
    assert len(official_t5.pieces) == 32100
    assert official_t5.pad == 0
    assert official_t5.end == 1
    assert official_t5.unknown == 2
    assert official_t5.max_length == 512
    assert official_t5.special["<extra_id_99>"] == 32000
    assert official_t5.special["<extra_id_0>"] == 32099


@pytest.mark.parametrize("tokenizer", [tiny_clip(), T5Tokenizer(PIECES)])
def test_what_is_not_text_is_refused_in_one_sentence(tokenizer):
    for text in (None, 3, b"bytes", ["list"], "half a \ud83d"):
        with pytest.raises(ValueError, match="prompt"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer("a prompt alone")
    with pytest.raises(ValueError, match="length must be at least"):
        tokenizer(["a"], length=0)


def test_a_very_long_word_is_split_in_time_that_grows_with_its_length():
    """A word of 50,000 characters: an algorithm of quadratic time would not finish."""
    word = "lowab" * 10_000
    clip = CLIPTokenizer(tiny_clip().vocab, [("o", "w</w>"), ("l", "ow</w>")])
    assert len(clip.encode(word)) == 50_000
    assert T5Tokenizer(PIECES).encode(word)


def test_tokenizers_die_with_their_model_and_can_be_copied(small_clip_folder, small_t5_folder):
    """No cache of a function keeps them alive."""
    for kind, folder in ((CLIPTokenizer, small_clip_folder), (T5Tokenizer, small_t5_folder)):
        tokenizer = kind.from_folder(folder)
        ids = tokenizer.encode("a red apple ﬁne")
        assert copy.deepcopy(tokenizer).encode("a red apple ﬁne") == ids
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a red apple ﬁne") == ids
        alive = weakref.ref(tokenizer)
        del tokenizer
        assert alive() is None


def test_a_full_cache_of_words_is_emptied(monkeypatch):
    monkeypatch.setattr("miniflux.tokenizers.text.CACHE_SIZE", 2)
    tokenizer = T5Tokenizer(PIECES)
    for word in ("a", "b", "ab", "ba", "a"):
        assert tokenizer.encode(word) == T5Tokenizer(PIECES).encode(word)
        assert len(tokenizer.cache) <= 2
