"""Pixtral's tokenizer: byte-level byte-pair encoding, as CLIP's without the end of words."""

import re
import unicodedata
from pathlib import Path

from ..files import read_json
from .bpe import byte_symbols, merge_pairs
from .text import SPACE, check_text, remembered

# How the text is cut into the pieces that byte-pair encoding works on, as tokenizer.json has it: a
# word begins where capitals begin, each digit stands alone, a run of other signs takes the line
# breaks after it along.
PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
           r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
           r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The same over one letter for each kind of character, as Python's patterns have no \p{..}: A
# capital, a small, x other letter, m mark, 0 digit, n line break, t other space than " ", / and .
# for all else.
PIECE = re.compile(r"[^nAax0]?[Axm]*[axm]+|[^nAax0]?[Axm]+[axm]*|0| ?[./m]+[n/]*|[ tn]*n+|"
                   r"[ tn]+(?![^ tn])|[ tn]+")
KINDS = {"Lu": "A", "Lt": "A", "Ll": "a", "Lm": "x", "Lo": "x", "Mn": "m", "Mc": "m", "Me": "m",
         "Nd": "0", "Nl": "0", "No": "0"}


def kind(character: str) -> str:
    if character in " /":
        return character
    if character in SPACE:
        return "n" if character in "\r\n" else "t"
    return KINDS.get(unicodedata.category(character), ".")


def split(text: str) -> list[str]:
    """
    >>> split("It's 10 FooBar!!\\n")
    ['It', "'s", ' ', '1', '0', ' Foo', 'Bar', '!!\\n']
    """
    return [text[piece.start():piece.end()] for piece in PIECE.finditer("".join(map(kind, text)))]


class PixtralTokenizer:
    """Byte-level BPE, as CLIP's without the end of words.

    vocab: symbol -> id.
    merges: pairs of symbols in the order in which they were learned.
    special: control token -> id.
    whole: whether a piece that is a token is taken as it is, before any merging.

    ValueError if they do not fit together."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]],
                 special: dict[str, int], whole: bool = False):
        self.symbols = byte_symbols()
        needed = [*self.symbols, *map("".join, merges)]
        if missing := [symbol for symbol in needed if symbol not in vocab]:
            raise ValueError(f"the vocabulary lacks bytes or products of merges: {missing[:5]}")
        self.vocab, self.special, self.whole = vocab, special, whole
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder) -> "PixtralTokenizer":
        """Reads tokenizer.json."""
        path = Path(folder) / "tokenizer.json"
        data = read_json(path)
        try:
            model, steps = data["model"], data["pre_tokenizer"]["pretokenizers"]
            has_more = model.get("byte_fallback") or data.get("normalizer")
            is_mistrals = steps[0]["pattern"]["Regex"] == PATTERN
            if model["type"] != "BPE" or has_more or not is_mistrals:
                raise ValueError("its model is not byte-level BPE over Mistral's pieces")
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair)
                      for pair in model["merges"]]
            if any(len(pair) != 2 for pair in merges):
                raise ValueError("a merge is no pair")
            special = {token["content"]: int(token["id"]) for token in data["added_tokens"]}
            vocab = {str(symbol): int(number) for symbol, number in model["vocab"].items()}
            return cls(vocab, merges, special, bool(model.get("ignore_merges")))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer of Pixtral "
                             f"({type(error).__name__}: {str(error):.100})") from None

    def encode(self, text: str) -> list[int]:
        """The tokens of the text.

        Note: control tokens typed in the text are ordinary text, or a prompt could end the question
        that is asked about it."""
        check_text(text)
        return [token for piece in split(text)
                for token in remembered(self.cache, piece, self.merge)]

    def merge(self, piece: str) -> list[int]:
        symbols = [self.symbols[byte] for byte in piece.encode("utf-8")]
        if self.whole and "".join(symbols) in self.vocab:
            return [self.vocab["".join(symbols)]]
        return [self.vocab[symbol] for symbol in merge_pairs(symbols, self.ranks)]
