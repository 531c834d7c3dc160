"""CLIP's tokenizer: byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909)."""

import heapq
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from .added_tokens import AddedToken, split_at
from .files import read_clip_files
from .normalisation import normalise_clip
from .text import SPACE, check_text, pad_and_truncate, remembered

START, END = "<|startoftext|>", "<|endoftext|>"

# Python's \w is exactly: letters (L*), numbers (N*), underscore. `split_clip` has put spaces
# around each number, so [^\W_]+ is a run of letters or one number. What looks like a special token
# here is none (it was typed in capitals): then it is three ordinary pieces.
CLIP_PIECE = re.compile(r"(<\|)(startoftext|endoftext)(\|>)|"
                        rf"('s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w{SPACE}]|_)+)")


def split_clip(text: str) -> list[str]:
    """Cut normalised text into the pieces that BPE works on: contractions, words, single numbers,
    runs of anything else.

    >>> split_clip("it's 10km—away!!")
    ['it', "'s", '1', '0', 'km', '—', 'away', '!!']

    Note: each digit, Roman or circled number is a piece of its own: "2024" is four tokens.
    """
    text = "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in text)
    return [piece for groups in CLIP_PIECE.findall(text) for piece in groups if piece]


def byte_symbols() -> list[str]:
    """One printable character for each byte (GPT-2): printable bytes stand for themselves, the rest
    from U+0100 upwards.

    >>> "".join(byte_symbols()[byte] for byte in "né !\\n".encode())
    'nÃ©Ġ!Ċ'
    """
    spare = map(chr, range(256, 512))
    return [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else next(spare)
            for b in range(256)]


class CLIPTokenizer:
    """Byte-level BPE with `</w>` at the end of each word.

    vocab: symbol -> id.
    merges: pairs of symbols in the order in which they were learned.
    max_length: tokens of a prompt, with start, end and padding.
    added: tokens that are found as a whole; by default start and end. Their ids are those of the
        vocabulary where they are in it.
    pad: the token that fills up; by default the end token.

    `<|endoftext|>` is also the token of what is unknown. ValueError if the vocabulary does not fit.

    With the official files: encode("a photo of 北京")
    == [320, 1125, 539, 161, 234, 245, 21078, 361]
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int = 77,
                 added: Iterable[AddedToken] | None = None, pad: str = END):
        missing = [symbol for symbol in [START, END, *map("".join, merges)] if symbol not in vocab]
        if missing:
            raise ValueError("CLIP's vocabulary lacks special tokens or products of merges: "
                             f"{missing[:5]}")
        tokens = {START: AddedToken(START, vocab[START], normalized=True),
                  END: AddedToken(END, vocab[END])}
        tokens |= {token.content: token for token in added or ()}
        self.vocab = {token.content: token.id for token in tokens.values()} | vocab
        tokens = [replace(token, id=self.vocab[token.content]) for token in tokens.values()]
        if pad not in self.vocab:
            raise ValueError(f"CLIP's vocabulary lacks its padding token {pad!r:.60}")
        self.max_length = max_length
        self.start, self.end, self.pad = self.vocab[START], self.vocab[END], self.vocab[pad]
        self.added = tokens
        self.typed, self.normalised = split_at(tokens, normalise_clip)
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.symbols = byte_symbols()
        self.cache: dict[str, list[int]] = {}

    @cached_property
    def id_to_symbol(self) -> dict[int, str]:
        """The vocabulary the other way round, to see what a prompt was split into."""
        return {number: symbol for symbol, number in self.vocab.items()}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "CLIPTokenizer":
        """Reads tokenizer.json, or vocab.json and merges.txt; and the files of settings that are
        there: tokenizer_config.json, special_tokens_map.json, added_tokens.json."""
        return cls(**read_clip_files(Path(folder)))

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Start, tokens, end, padding: (B, length)."""
        length = self.max_length if length is None else length
        return pad_and_truncate(self.encode, texts, length, [self.start], self.end, self.pad)

    def encode(self, text: str) -> list[int]:
        """The tokens of the text alone, without start and end.

        Note: special tokens typed in the text are honoured: END in the text as it is, START in
        small letters or capitals.
        """
        check_text(text)
        ids = []
        for part, typed in self.typed.split(text):
            ids += typed
            for words, added in self.normalised.split(normalise_clip(part)):
                ids += added
                for piece in split_clip(words):
                    ids += remembered(self.cache, piece, self.merge)
        return ids

    def merge(self, piece: str) -> list[int]:
        """The tokens of a piece: "low" -> l o w</w> -> lo w</w> -> low</w>."""
        symbols = [self.symbols[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += "</w>"
        return [self.vocab.get(symbol, self.end) for symbol in merge_pairs(symbols, self.ranks)]


def merge_pairs(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: merge the pair with the lowest rank (of equals: the leftmost) until no
    pair has a rank.

    A heap holds the candidates, so n bytes cost O(n log n).
    """
    n = len(symbols)
    # The neighbours of each symbol; a merged symbol leaves "" on the right.
    before, after = list(range(-1, n)), list(range(1, n + 2))
    heap = []

    def consider(i: int) -> None:
        pair = (symbols[i], symbols[after[i]]) if i >= 0 and after[i] < n else None
        if pair in ranks:
            heapq.heappush(heap, (ranks[pair], i, pair))

    for i in range(n):
        consider(i)
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = after[i]
        # Otherwise one of them was merged with another neighbour meanwhile.
        if j < n and pair == (symbols[i], symbols[j]):
            symbols[i], symbols[j] = symbols[i] + symbols[j], ""
            after[i], before[after[j]] = after[j], i
            consider(before[i])
            consider(i)
    return [symbol for symbol in symbols if symbol]
