"""The words that a small model was taught. Oracles: by hand; the shipped model's list."""

import logging

import pytest

from miniflux import generate, load, word_list
from miniflux.checkpoints.configs import read_words
from miniflux.word_list import unknown_words, words_of


def test_words_are_read_in_any_case_and_numbers_are_none():
    assert words_of("Two T-Rexes, 3 OWLS at the cat's house!") == [
        "two", "t-rexes", "owls", "at", "the", "cat", "house"]


def test_a_near_word_is_suggested_where_there_is_one():
    words = frozenset(["a", "rocket", "on", "cat"])
    unknown = unknown_words(words, "a rockett on a dragon, a ROCKET")
    assert unknown == {"rockett": "rocket", "dragon": None}
    assert unknown_words(words, "A cat") == {}


def test_each_word_that_the_model_was_not_taught_is_named_once(caplog):
    word_list._named.clear()
    flux = load("tiny", device="cpu")
    with caplog.at_level(logging.WARNING, "miniflux"):
        for _ in range(2):
            generate(flux, "an astronaut next to a penguinn", steps=1, progress=False)
        generate(flux, "two owls at night", steps=1, progress=False)
    message, = [record.getMessage() for record in caplog.records]
    assert "the model tiny was not taught: astronaut, penguinn (near: penguin); " in message


def test_variants_have_the_words_of_their_base():
    assert load("tiny-canny", device="cpu").config.words == load("tiny", device="cpu").config.words


@pytest.mark.parametrize("content", ['{"a": 1}', '{"words": [1]}', "nonsense"])
def test_a_list_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(ValueError, match="words.json"):
        read_words(tmp_path)


def test_a_model_without_a_list_may_be_asked_for_anything(tmp_path):
    assert read_words(tmp_path) is None
