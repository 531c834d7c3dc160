"""T5's tokenizer: a unigram model over normalised text in which "▁" stands for a space.

Source: Kudo 2018, arXiv:1804.10959.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from .added_tokens import AddedToken, split_at
from .files import read_t5_files
from .normalisation import CharacterMap
from .text import SPACE, check_text, pad_and_truncate, remembered

SPECIAL = re.compile(r"<pad>|</s>|<unk>|<extra_id_\d+>")
UNKNOWN_PENALTY = 10.0   # an unknown character scores this much less than the least probable piece


class T5Tokenizer:
    """The unigram model of T5.

    pieces: (piece, log-probability) in the order of their ids.
    charsmap: the bytes of a `CharacterMap`; b"" changes nothing.
    max_length: tokens of a prompt, with end and padding.
    added: tokens that are found as a whole; by default the pieces named like T5's special tokens.
        Their ids are those of the pieces where they are among them.
    pad: the token that fills up.
    prepend_always: whether every word gets a "▁" in front (as transformers 5 saves it), or only the
        start of the text and what follows a space.

    ValueError if a special token is missing or the map is damaged.

    With the official files: encode("a photo of 北京") == [3, 9, 1202, 13, 3, 2]
    """

    def __init__(self, pieces: list[tuple[str, float]], charsmap: bytes = b"",
                 max_length: int = 512, added: Iterable[AddedToken] | None = None,
                 pad: str = "<pad>", prepend_always: bool = False):
        self.pieces = {piece: (number, score) for number, (piece, score) in enumerate(pieces)}
        missing = [token for token in ("<pad>", "</s>", "<unk>") if token not in self.pieces]
        if missing:
            raise ValueError(f"T5's vocabulary of {len(pieces)} pieces lacks {missing}")
        if added is None:
            added = [AddedToken(piece, number) for number, (piece, _) in enumerate(pieces)
                     if SPECIAL.fullmatch(piece)]
        ids = {token.content: token.id for token in added}
        ids |= {piece: number for piece, (number, _) in self.pieces.items()}
        added = [replace(token, id=ids[token.content]) for token in added]
        self.added, self.charsmap = added, charsmap
        self.special = {token.content: token.id for token in added}
        if pad not in ids:
            raise ValueError(f"T5's vocabulary lacks its padding token {pad!r:.60}")
        self.pad, self.end, self.unknown = ids[pad], ids["</s>"], ids["<unk>"]
        self.max_length, self.prepend_always = max_length, prepend_always
        self.map_characters = CharacterMap(charsmap)
        self.typed, self.normalised = split_at(added, self.normalise)
        self.longest = max(map(len, self.pieces))
        self.unknown_score = min(score for _, score in pieces) - UNKNOWN_PENALTY
        self.cache: dict[str, list[int]] = {}

    @cached_property
    def id_to_piece(self) -> dict[int, str]:
        """The vocabulary the other way round, to see what a prompt was split into."""
        return {number: piece for piece, (number, _) in self.pieces.items()}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "T5Tokenizer":
        """Reads tokenizer.json or, where there is none, spiece.model; and the files of settings
        that are there: tokenizer_config.json, special_tokens_map.json, added_tokens.json."""
        return cls(**read_t5_files(Path(folder)))

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Pieces, `</s>`, padding: (B, length)."""
        length = self.max_length if length is None else length
        return pad_and_truncate(self.encode, texts, length, [], self.end, self.pad)

    def encode(self, text: str) -> list[int]:
        """The pieces of the text alone, without `</s>`.

        Note: special tokens typed in the text are honoured, and only the very start of a text gets
        a "▁" put in front (or every word, with `prepend_always`).
        """
        check_text(text)
        ids, is_start = [], True
        for part, typed in self.typed.split(text):
            ids += typed
            for words, added in self.normalised.split(self.normalise(part)):
                ids += added
                for word in self.words(words, is_start):
                    ids += remembered(self.cache, word, self.viterbi_segment)
                is_start = False
            is_start = False
        return ids

    def normalise(self, text: str) -> str:
        """Map characters; then drop spaces on the right and make several one "▁":
        "a  ﬁne day " -> "a▁fine day"."""
        text = self.map_characters(text)
        return text if self.prepend_always else re.sub(" {2,}", "▁", text.rstrip(SPACE))

    def words(self, text: str, is_start: bool) -> list[str]:
        """The words of a normalised text, each with the "▁" before it."""
        if self.prepend_always:
            words = [word for word in re.split(f"[{SPACE}]+", text) if word]
            text = "".join(word if word[0] == "▁" else f"▁{word}" for word in words)
        else:
            text = text.replace(" ", "▁")
            if is_start and text and text[0] != "▁":
                text = f"▁{text}"
        return re.findall("▁[^▁]*|[^▁]+", text)

    def viterbi_segment(self, word: str) -> list[int]:
        """Viterbi: the most probable segmentation of a word into pieces.

        best[end] = max over the pieces word[start:end] of best[start] + log p(piece)

        Note: of equal scores the earlier start wins. A character that is no piece is unknown;
        neighbours make one <unk>.
        """
        best = [0.0] + [-math.inf] * len(word)
        # Start and id of the last piece of the best segmentation up to each end.
        last = [(0, self.unknown)] * len(best)
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                number, score = self.pieces.get(word[start:end], (None, 0.0))
                if number is None and end == start + 1:
                    number, score = self.unknown, self.unknown_score
                if number is not None and best[start] + score > best[end]:
                    best[end], last[end] = best[start] + score, (start, number)
        ids, end = [], len(word)
        while end > 0:
            end, number = last[end]
            if [number] != ids[-1:] or number != self.unknown:
                ids.append(number)
        return ids[::-1]
