"""Normalisation, against the `tokenizers` library and by hand."""

import base64
import json
import random
import struct
import unicodedata
from itertools import product

import pytest
from tokenizer_texts import (
    OFFICIAL,
    assigned,
    charsmap_of,
    official,
)
from tokenizers import normalizers

from miniflux.tokenizers.normalisation import CharacterMap, clusters, normalise_clip


@official
def test_grapheme_clusters_are_those_of_the_library(official_t5):
    """Oracle: the library's own character map.

    The texts are pairs and triples of all kinds of characters that join or do not."""
    settings = json.loads((OFFICIAL / "tokenizer_2/tokenizer.json").read_text())
    charsmap = settings["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    reference = normalizers.Precompiled(base64.b64decode(charsmap))
    kinds = ("Mn", "Mc", "Me", "Cf", "Cc", "Lm", "Sk", "Zl", "Zp")
    marks = [c for c in assigned() if unicodedata.category(c) in kinds]
    for base, mark, end in product(("²", "ﬁ", "a", ""), marks, ("", "\u0301", "ﬁ\u0301")):
        text = base + mark + end
        assert official_t5.map_characters(text) == reference.normalize_str(text), ascii(text)


def test_lower_case_is_taken_character_by_character():
    """A final capital sigma becomes σ, never ς; the dotted capital I becomes i and a dot."""
    assert normalise_clip("ΟΔΟΣ İ") == "οδοσ i\u0307"


def test_a_short_cluster_is_replaced_as_a_whole_by_its_shortest_prefix():
    """An accent after a mapped character is lost in a cluster below six bytes, else it is kept."""
    characters = CharacterMap(charsmap_of(q="K", w=""))
    assert characters("q a w") == "K a "
    assert characters("q\u0301") == "K"
    assert characters("q\u0301\u0301\u0301") == "K\u0301\u0301\u0301"
    assert characters("a\u0301\x00q") == "a\u0301\x00K"
    assert CharacterMap(b"")("q\u0301") == "q\u0301"


def test_grapheme_clusters_follow_annex_29():
    expected = ["e\u0301\u200d", "a", "\r\n", "\u0301", "\u0600x\u0e33"]
    assert list(clusters("".join(expected))) == expected
    assert list(clusters("\n\r \u102b")) == ["\n", "\r", " ", "\u102b"]
    assert list(clusters("")) == []


def test_a_damaged_character_map_is_refused_or_harmless():
    """Offsets that lead outside are refused on loading; a map that loads ends for every text."""
    good = charsmap_of(q="K")
    for bad in (
        b"\1",
        good[:100],
        struct.pack("<I", 2**31) + good[4:],
        struct.pack("<I", 1027) + good[4:],
        bytes(8),
    ):
        with pytest.raises(ValueError, match="character map"):
            CharacterMap(bad)
    outside = bytearray(good)
    struct.pack_into("<I", outside, 4, 0x7FFFFF00)
    with pytest.raises(ValueError, match="leads outside"):
        CharacterMap(bytes(outside))
    draw = random.Random(7)
    for _ in range(300):
        scrambled = bytearray(good)
        for _ in range(20):
            scrambled[draw.randrange(4, len(good))] = draw.randrange(256)
        try:
            characters = CharacterMap(bytes(scrambled))
        except ValueError:
            continue
        for text in ("q", "aq\u0301", "the quick brown fox", "北京\x00"):
            assert isinstance(characters(text), str)
