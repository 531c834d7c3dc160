"""T5's tokenizer, against the `tokenizers` library, SentencePiece, and by hand."""

import random
import unicodedata

import pytest
from tokenizer_texts import (
    OFFICIAL,
    PIECES,
    WORDS,
    assert_equal,
    copy,
    each_code_point,
    official,
    strings,
    t5_pipeline,
)
from tokenizers import Tokenizer

from miniflux.tokenizers import T5Tokenizer
from miniflux.tokenizers.files import read_spiece_model


@official
def test_t5_equals_the_tokenizers_library_on_the_official_files(official_t5):
    """Oracle: the official tokenizer.json run by the `tokenizers` library."""
    reference = Tokenizer.from_file(str(OFFICIAL / "tokenizer_2/tokenizer.json"))
    assert_equal(official_t5, reference, strings(50_000, seed=2))
    assert_equal(official_t5, reference, each_code_point())


def test_t5_equals_the_tokenizers_library_on_a_small_vocabulary(small_t5_folder, tmp_path):
    """Oracle: the `tokenizers` library with the rules of T5's tokenizer.json.

    Its pieces are those that SentencePiece reports."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(small_t5_folder / "spiece.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in (2, 1, 0)]
    from_spiece = T5Tokenizer.from_folder(copy(small_t5_folder, tmp_path / "spiece", extra_ids=3))
    charsmap = read_spiece_model(small_t5_folder / "spiece.model")[1]
    reference = t5_pipeline(pieces, charsmap)
    texts = strings(50_000, seed=4)
    assert_equal(from_spiece, reference, texts)

    (tmp_path / "json").mkdir()
    reference.save(str(tmp_path / "json/tokenizer.json"))
    from_json = T5Tokenizer.from_folder(tmp_path / "json")
    assert from_json.pieces == from_spiece.pieces
    assert from_json.special == from_spiece.special
    for text in texts[:5000]:
        assert from_json.encode(text) == from_spiece.encode(text)


def test_t5_equals_sentencepiece_where_the_definitions_agree(small_t5_folder):
    """Oracle: SentencePiece itself, on plain words.

    It has no grapheme clusters and no typed special tokens, and it adds in float32."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(small_t5_folder / "spiece.model"))
    tokenizer = T5Tokenizer.from_folder(small_t5_folder)
    draw = random.Random(5)
    pools = [WORDS, list("aeinorst"), list("北京é①Σ \t\u3000"), list("astronautphoto' ,.")]
    texts = []
    for _ in range(20_000):
        text = ""
        for _ in range(draw.randint(0, 30)):
            text += draw.choice(draw.choice(pools)) + draw.choice(["", " "])
        texts.append(unicodedata.normalize("NFC", text))
    wrong = [t for t, e in zip(texts, model.encode(texts)) if tokenizer.encode(t) != e]
    assert not wrong, (len(wrong), ascii(min(wrong, key=len)))


T5_EXAMPLES = {
    "A cat holding a sign that says hello world":
        [71, 1712, 3609, 3, 9, 1320, 24, 845, 21820, 296],
    "": [],
    "Hello,  World's 2024 café!! 🙂":
        [8774, 6, 1150, 31, 7, 460, 2266, 11949, 1603, 3, 2],
    "It's 10km—away…": [94, 31, 7, 335, 5848, 318, 8006, 233],
    "x\u00a0y\ttab\nnew": [3, 226, 3, 63, 3808, 126],
    "a photo of 北京": [3, 9, 1202, 13, 3, 2],
}


@official
def test_t5_gives_the_known_ids_of_the_examples(official_t5):
    """Oracle: golden numbers of the reference."""
    for text, ids in T5_EXAMPLES.items():
        assert official_t5.encode(text) == ids
        assert official_t5([text], length=32).tolist() == [ids + [1] + [0] * (31 - len(ids))]


def test_t5_truncation_keeps_the_end_token_and_padding_fills_the_length():
    tokenizer = T5Tokenizer(PIECES, max_length=6)
    assert tokenizer(["ab", "b b b b b b", ""]).tolist() == [
        [3, 6, 1, 0, 0, 0],
        [3, 5, 3, 5, 3, 1],
        [1, 0, 0, 0, 0, 0],
    ]
    assert tokenizer([]).shape == (0, 6)
    assert tokenizer(["ab"], length=1).tolist() == [[1]]


def test_of_equal_scores_the_earlier_start_wins():
    """▁ + a and ▁a both score -5."""
    assert T5Tokenizer(PIECES).encode("a") == [7]
    assert T5Tokenizer(PIECES + [("▁ab", -6.0)]).encode("ab") == [8]  # against ▁ + ab


def test_an_unknown_character_scores_ten_less_than_the_least_piece_and_neighbours_are_one():
    tokenizer = T5Tokenizer(PIECES)
    assert tokenizer.unknown_score == -15.0
    assert tokenizer.encode("xyz a xaxx") == [3, 2, 7, 3, 2, 4, 2]


def test_leading_spaces_are_not_doubled_and_only_spaces_are_nothing():
    tokenizer = T5Tokenizer(PIECES)
    assert tokenizer.encode(" a") == tokenizer.encode("  a  ") == tokenizer.encode("a") == [7]
    assert tokenizer.encode("    ") == tokenizer.encode("") == []


def test_text_after_a_special_token_gets_no_space_in_front():
    tokenizer = T5Tokenizer(PIECES)
    assert tokenizer.encode("a</s>a a") == [7, 1, 4, 7]
    assert tokenizer.encode("</s>a") == [1, 4]


@official
def test_text_after_an_extra_id_follows_tokenizer_json(official_t5):
    """Oracle: tokenizer.json; the class T5Tokenizer of transformers 5 would give 296, "▁world"."""
    assert official_t5.encode("hello<extra_id_5>world") == [21820, 32094, 7276]
