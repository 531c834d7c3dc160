"""Normalisation: texts that mean the same become the same, before they are cut into pieces.

CLIP composes accents, joins spaces and makes everything lower case. T5 maps characters:
SentencePiece stores an NFKC-like table as a trie inside its models, which is applied to grapheme
clusters, what a reader sees as one character (Unicode Annex 29).

Source: Kudo & Richardson 2018, arXiv:1808.06226.
"""

import re
import struct
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from .text import SPACE

# --------------------------------------------------------------------------------------------- CLIP


def normalise_clip(text: str) -> str:
    """NFC, one space for several, lower case.

    >>> normalise_clip("OΣ \\t 42")
    'oσ 42'

    Note: lower case goes character by character. `str.lower` looks at the neighbours: "OΣ".lower()
    is "oς".
    """
    text = re.sub(f"[{SPACE}]+", " ", unicodedata.normalize("NFC", text))
    return "".join(c.lower() for c in text)


# ----------------------------------------------------------------------------------------------- T5

# What of Annex 29's classes Extend and Prepend does not follow from the general category.
JOINS_LEFT = re.compile("[\u0e33\u0eb3\u200c\u200d\uff9e\uff9f"
                        "\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
STANDS_ALONE = re.compile("[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f"
                          "\u109a-\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d\U00011720\U00011721]")
JOINS_RIGHT = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd"
                         "\U000110cd\U000111c2\U000111c3\U000113d1\U0001193f\U00011941"
                         "\U00011a84-\U00011a89\U00011d46\U00011f02]")


@lru_cache(maxsize=50_000)
def joining(c: str) -> str:
    """How a character joins its neighbours in a cluster: "left", "right", "never" (controls) or not
    by itself, ""."""
    category = unicodedata.category(c)
    if JOINS_LEFT.match(c) or category[0] == "M" and not STANDS_ALONE.match(c):
        return "left"
    if JOINS_RIGHT.match(c):
        return "right"
    return "never" if category in ("Cc", "Cf", "Zl", "Zp") else ""


def clusters(text: str) -> Iterator[str]:
    """Cut text into grapheme clusters, what a reader sees as one character.

    >>> [len(cluster) for cluster in clusters("ae\\u0301\\r\\nx")]
    [1, 2, 2, 1]

    Note: only clusters below six bytes matter to `CharacterMap`, so the rules that make longer ones
    are left out: Hangul syllables, flags, Indic conjuncts, emoji sequences. (It shows only where a
    later member of such a sequence is a character that the map replaces *and* has a two-byte
    accent, as in: heart, zero-width joiner, ™, U+0301.)
    """
    start = 0
    for i in range(1, len(text)):
        left, right = joining(text[i - 1]), joining(text[i])
        joined = (right == "left" or left == "right") and "never" not in (left, right)
        if not joined and text[i - 1 : i + 1] != "\r\n":
            yield text[start:i]
            start = i
    if text:
        yield text[start:]


class CharacterMap:
    """SentencePiece's precompiled map of characters: "ﬁ" -> "fi", "①" -> "1", "\\t" -> " ", most
    controls -> nothing.

    The bytes are: u32 size of a trie, the trie, the replacements (UTF-8, each ended by NUL). The
    trie is a double array (Aoe 1989, laid out as in darts-clone): node p's child by byte b is unit
    p ^ offset(p) ^ b, if that unit's label is b.

        unit, 32 bits:  [30..10] offset
                        [9] the offset counts in 256s
                        [8] a replacement ends here: its position is in unit p ^ offset(p)
                        [31 and 7..0] label; bit 31 marks units with positions
    """

    def __init__(self, charsmap: bytes):
        size = struct.unpack_from("<I", charsmap)[0] if len(charsmap) >= 4 else 0
        if charsmap and (size % 4 or not 4 <= size <= len(charsmap) - 4):
            raise ValueError(f"the character map is damaged: a trie of {size} bytes "
                             f"does not fit {len(charsmap)} bytes")
        units = np.frombuffer(charsmap[4 : 4 + size], "<u4")
        offsets = (units >> 10) << ((units & 512) >> 6)
        children = np.arange(len(units), dtype=np.uint32) ^ offsets             # p ^ offset(p)
        if np.any((children | 255)[units >> 31 == 0] >= len(units)):
            raise ValueError("the character map is damaged: "
                             f"its trie leads outside of its {len(units)} units")
        self.units, self.children = units.tolist(), children.tolist()
        self.replacements = charsmap[4 + size :]

    def __call__(self, text: str) -> str:
        return "".join(map(self.replace, clusters(text))) if self.units else text

    def replace(self, cluster: str) -> str:
        """What stands for a cluster.

        Note: a cluster below six bytes is tried as a whole, and replaced as a whole by what its
        *shortest* known prefix stands for: "ﬁ" with an accent becomes "fi", the accent is lost. All
        else goes character by character.
        """
        whole = self.find(cluster) if len(cluster.encode("utf-8")) < 6 else None
        if whole is not None:
            return whole
        return "".join(c if (found := self.find(c)) is None else found for c in cluster)

    def find(self, key: str) -> str | None:
        """The replacement of the shortest prefix of `key` that has one."""
        node = self.children[0]
        for byte in key.encode("utf-8"):
            unit, node = self.units[node ^ byte], self.children[node ^ byte]
            if unit & 0x800000FF != byte:
                return None
            if unit & 256:
                position = self.units[node] & 0x7FFFFFFF
                replacement = self.replacements[position:].split(b"\0", 1)[0]
                return replacement.decode("utf-8", errors="replace")
        return None
