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
    assert all(
        doctest.testmod(module).failed == 0
        for module in (added_tokens, bpe, files, normalisation, pixtral, unigram)
    )


@official
def test_the_official_vocabularies_have_the_known_layout(official_clip, official_t5):
    assert (len(official_clip.vocab), official_clip.start, official_clip.end) == (
        49408,
        49406,
        49407,
    )
    assert (len(official_t5.pieces), official_t5.pad, official_t5.end, official_t5.unknown) == (
        32100,
        0,
        1,
        2,
    )
    assert (official_clip.max_length, official_t5.max_length) == (77, 512) and official_t5.special[
        "<extra_id_99>"
    ] == 32000
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


def test_a_very_long_word_is_cut_in_time_that_grows_with_its_length():
    """A word of 50,000 characters: an algorithm whose time grows with the square would not come
    back."""
    clip, t5 = (
        CLIPTokenizer(tiny_clip().vocab, [("o", "w</w>"), ("l", "ow</w>")]),
        T5Tokenizer(PIECES),
    )
    assert len(clip.encode("lowab" * 10_000)) == 50_000 and t5.encode("lowab" * 10_000)


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
