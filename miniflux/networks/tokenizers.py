"""From text to token numbers: CLIP's byte-level BPE and T5's unigram model.

FLUX.1 reads a prompt twice. CLIP's tokens become one vector that colours the whole picture; T5's tokens are the sequence
the transformer attends to. The two tokenizers answer one question, "which pieces is this text made of?", from two ends:

    CLIP  byte-pair encoding, bottom up: start from single bytes, glue the pair that was learned first, repeat.
    T5    unigram model, top down: each piece has a log-probability; of all ways to cut a word take the most probable one.

    "Hello,  World's 2024"  ->  CLIP  hello</w> ,</w> world</w> 's</w> 2</w> 0</w> 2</w> 4</w>
                            ->  T5    ▁Hello , ▁World ' s ▁20 24

Both turn `list[str]` into int64 tensors (B, length), framed and padded as the text encoders were trained, and equal the
fast tokenizers of the `tokenizers` library. Where they cannot: code points newer than this Python's Unicode tables, and
CLIP's NFC for combining marks newer than Unicode 9 (the library's tables are older there).

Sources: BPE: Sennrich et al. 2016, arXiv:1508.07909. CLIP: Radford et al. 2021, arXiv:2103.00020. Unigram: Kudo 2018,
arXiv:1804.10959. SentencePiece: Kudo & Richardson 2018, arXiv:1808.06226. Grapheme clusters: Unicode Annex 29.
"""

import heapq
import math
import re
import unicodedata
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from .character_map import CharacterMap
from .tokenizer_files import (
    read_bytes,
    read_json,
    read_max_length,
    read_spiece_model,
    read_tokenizer_json,
)

remember = lru_cache(maxsize=50_000)  # prompts repeat their words; the least recently used are forgotten


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a str, got {type(text).__name__}: {text!r:.60}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"the prompt has a lone surrogate, which is no character, expected valid Unicode: {text!r:.60}")


def frame(encode: Callable, texts: list[str], length: int, start: list[int], end: int, pad: int) -> torch.Tensor:
    """`start`, the tokens of each text, `end`, then `pad` up to `length`: (B, length).

    Note: truncation cuts the text's tokens; the end token always stays.
    """
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"texts must be a list of strings, got {type(texts).__name__}: {texts!r:.60}")
    room = length - len(start) - 1
    if room < 0:
        raise ValueError(f"length must be at least {len(start) + 1}, to hold the special tokens, got {length}")
    rows = [start + encode(text)[:room] + [end] for text in texts]
    rows = [row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)  # (B, length), also for B = 0


# ---------------------------------------------------------------------------------------------------------------- CLIP

START, END = "<|startoftext|>", "<|endoftext|>"

# Unicode's White_Space. Note: Python's \s also counts the separators U+001C..U+001F.
SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

# Python's \w is exactly: letters (L*), numbers (N*), underscore. `normalise_clip` has put spaces around each number, so
# [^\W_]+ is a run of letters or one number. END gets here only if typed in capitals: then it is three ordinary pieces.
CLIP_PIECE = re.compile(rf"(<\|)(endoftext)(\|>)|('s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w{SPACE}]|_)+)")


def normalise_clip(text: str) -> str:
    """NFC, lower case, numbers set apart.

    >>> normalise_clip("OΣ 42 Ⅷ")
    'oσ  4  2   ⅷ '

    Note: lower case goes character by character. `str.lower` looks at the neighbours: "OΣ".lower() is "oς".
    Note: each digit, Roman or circled number is a piece of its own: "2024" is four tokens.
    """
    lower = (c.lower() for c in unicodedata.normalize("NFC", text))
    return "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in lower)


def split_clip(text: str) -> list[str]:
    """Cut normalised text into the pieces BPE works on: contractions, words, single numbers, runs of anything else.

    >>> split_clip(normalise_clip("It's 10km—away!!"))
    ['it', "'s", '1', '0', 'km', '—', 'away', '!!']
    """
    return [piece for groups in CLIP_PIECE.findall(text) for piece in groups if piece]


def byte_symbols() -> list[str]:
    """One printable character for each byte (GPT-2): printable bytes stand for themselves, the rest from U+0100 upwards.

    >>> "".join(byte_symbols()[byte] for byte in "né !\\n".encode())
    'nÃ©Ġ!Ċ'
    """
    spare = map(chr, range(256, 512))
    return [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else next(spare) for b in range(256)]


class CLIPTokenizer:
    """Byte-level BPE with `</w>` at the end of each word.

    vocab: symbol -> id; merges: pairs of symbols in the order they were learned. `<|startoftext|>` and `<|endoftext|>`
    (which is end, padding and unknown in one) have the ids the vocabulary gives them. ValueError if it does not fit.

    With the official files: encode("a photo of 北京") == [320, 1125, 539, 161, 234, 245, 21078, 361]
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int = 77):
        missing = [symbol for symbol in [START, END, *map("".join, merges)] if symbol not in vocab]
        if missing:
            raise ValueError(f"CLIP's vocabulary lacks special tokens or products of merges: {missing[:5]}")
        self.vocab, self.max_length = vocab, max_length
        self.start, self.end = vocab[START], vocab[END]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.symbols = byte_symbols()

    @cached_property
    def id_to_symbol(self) -> dict[int, str]:
        """The vocabulary the other way round, to see what a prompt was split into."""
        return {number: symbol for symbol, number in self.vocab.items()}

    @classmethod
    def from_folder(cls, folder) -> "CLIPTokenizer":
        """Reads vocab.json, merges.txt and, where there is one, tokenizer_config.json."""
        folder = Path(folder)
        vocab = read_json(folder / "vocab.json")
        lines = read_bytes(folder / "merges.txt").decode("utf-8", errors="replace").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        if {len(pair) for pair in merges} - {2} or not all(type(number) is int and number >= 0 for number in vocab.values()):
            raise ValueError(f"{folder} is damaged, expected numbers in vocab.json and pairs in merges.txt")
        return cls(vocab, merges, read_max_length(folder, default=77))

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Start, tokens, end, padded with end: (B, length)."""
        return frame(self.encode, texts, self.max_length if length is None else length, [self.start], self.end, self.end)

    def encode(self, text: str) -> list[int]:
        """The tokens of the text alone, without start and end.

        Note: special tokens typed in the text are honoured: END in the text as it is, START in small letters or capitals.
        """
        check_text(text)
        ids = []
        for i, part in enumerate(text.split(END)):
            ids += [self.end] * (i > 0)
            for j, words in enumerate(normalise_clip(part).split(START)):
                ids += [self.start] * (j > 0)
                for piece in split_clip(words):
                    ids += self.merge(piece)
        return ids

    @remember
    def merge(self, piece: str) -> list[int]:
        """The tokens of a piece: "low" -> l o w</w> -> lo w</w> -> low</w>."""
        symbols = [self.symbols[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += "</w>"
        return [self.vocab.get(symbol, self.end) for symbol in merge_pairs(symbols, self.ranks)]


def merge_pairs(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: glue the pair with the lowest rank (of equals: the leftmost) until no pair has a rank.

    A heap holds the candidates, so n bytes cost O(n log n).
    """
    n = len(symbols)
    before, after = list(range(-1, n)), list(range(1, n + 2))  # neighbours; a glued symbol leaves "" on the right
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
        if j < n and pair == (symbols[i], symbols[j]):  # else one of them was glued to another neighbour meanwhile
            symbols[i], symbols[j] = symbols[i] + symbols[j], ""
            after[i], before[after[j]] = after[j], i
            consider(before[i])
            consider(i)
    return [symbol for symbol in symbols if symbol]


# ------------------------------------------------------------------------------------------------------------------ T5

SPECIAL = re.compile(r"<pad>|</s>|<unk>|<extra_id_\d+>")
UNKNOWN_PENALTY = 10.0  # an unknown character scores this much less than the least probable piece

class T5Tokenizer:
    """Unigram model over normalised text in which "▁" stands for a space.

    pieces: (piece, log-probability) in the order of their ids; charsmap: the bytes of a `CharacterMap` (b"": none);
    special: token -> id, cut out of the text as it is; by default the pieces named like T5's. `<pad>`, `</s>` and `<unk>`
    have the ids the pieces give them. ValueError if one is missing or the map is damaged.

    With the official files: encode("a photo of 北京") == [3, 9, 1202, 13, 3, 2]
    """

    def __init__(self, pieces: list[tuple[str, float]], charsmap: bytes = b"", max_length: int = 512,
                 special: dict[str, int] | None = None):
        self.pieces = {piece: (number, score) for number, (piece, score) in enumerate(pieces)}
        missing = [token for token in ("<pad>", "</s>", "<unk>") if token not in self.pieces]
        if missing:
            raise ValueError(f"T5's vocabulary of {len(pieces)} pieces lacks {missing}")
        if special is None:
            special = {piece: number for number, (piece, _) in enumerate(pieces) if SPECIAL.fullmatch(piece)}
        self.pad, self.end, self.unknown = (self.pieces[token][0] for token in ("<pad>", "</s>", "<unk>"))
        self.special, self.max_length = special, max_length
        longest_first = map(re.escape, sorted(special, key=len, reverse=True))
        self.special_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.map_characters = CharacterMap(charsmap)
        self.longest = max(map(len, self.pieces))
        self.unknown_score = min(score for _, score in pieces) - UNKNOWN_PENALTY

    @cached_property
    def id_to_piece(self) -> dict[int, str]:
        """The vocabulary the other way round, to see what a prompt was split into."""
        return {number: piece for piece, (number, _) in self.pieces.items()}

    @classmethod
    def from_folder(cls, folder) -> "T5Tokenizer":
        """Reads tokenizer.json or, where there is none, spiece.model; and tokenizer_config.json where there is one."""
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            pieces, charsmap, special = read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "spiece.model").exists():
            pieces, charsmap, special = read_spiece_model(folder / "spiece.model")
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor spiece.model, expected one of T5's tokenizer")
        return cls(pieces, charsmap, read_max_length(folder, default=512), special)

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Pieces, `</s>`, padded with `<pad>`: (B, length)."""
        return frame(self.encode, texts, self.max_length if length is None else length, [], self.end, self.pad)

    def encode(self, text: str) -> list[int]:
        """The pieces of the text alone, without `</s>`.

        Note: special tokens typed in the text are honoured, and only the very start of a text gets a "▁" put in front.
        """
        check_text(text)
        ids = []
        for i, part in enumerate(self.special_pattern.split(text)):  # ordinary, special, ordinary, ...
            if i % 2:
                ids.append(self.special[part])
                continue
            part = self.normalise(part)
            if i == 0 and part and part[0] != "▁":
                part = "▁" + part
            for word in re.findall("▁[^▁]*|[^▁]+", part):
                ids += self.cut(word)
        return ids

    def normalise(self, text: str) -> str:
        """Map characters, drop spaces on the right, turn runs of spaces into "▁": "a  ﬁne day " -> "a▁fine▁day"."""
        return re.sub(" +", "▁", self.map_characters(text).rstrip(SPACE))

    @remember
    def cut(self, word: str) -> list[int]:
        """Viterbi: the most probable way to cut a word into pieces.

        best[end] = max over the pieces word[start:end] of best[start] + log p(piece)

        Note: of equal scores the earlier start wins. A character that is no piece is unknown; neighbours make one <unk>.
        """
        best = [0.0] + [-math.inf] * len(word)
        last = [(0, self.unknown)] * len(best)  # start and id of the last piece of the best way to reach each end
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
