"""Tokens that are found in the text as a whole, before it is cut into pieces.

Special tokens such as "</s>" are of this kind, and words that a fine-tuning has added ("<s0>"). The
rules are those of the `tokenizers` library, `added_vocabulary.rs`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from .text import SPACE

SPACES = re.compile(f"[{SPACE}]*")


@dataclass(frozen=True)
class AddedToken:
    """A token and how it is found; the names are those of the files."""

    content: str
    id: int
    normalized: bool = False     # in the normalised text, else in the text as it was typed
    single_word: bool = False    # only where no letter or number touches it
    lstrip: bool = False         # together with the spaces to its left
    rstrip: bool = False         # together with the spaces to its right


class AddedTokens:
    """Splits a text at its added tokens."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self.tokens = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def split(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """(ordinary text, []) and ("", the ids of an added token), in order."""
        begin = 0
        for match in self.pattern.finditer(text):
            token = self.tokens[match[0]]
            start, end = match.span()
            touches = text[max(start - 1, 0):start] + text[end:end + 1]
            if token.single_word and re.search(r"\w", touches):
                continue
            if token.lstrip:
                start = begin + len(text[begin:start].rstrip(SPACE))
            if token.rstrip:
                end = SPACES.match(text, end).end()
            if begin < start:
                yield text[begin:start], []
            yield "", self.ids(token)
            begin = end
        if begin < len(text):
            yield text[begin:], []

    def ids(self, token: AddedToken) -> list[int]:
        """The token, and behind "<s>" also "<s>_1", "<s>_2", ...: a word that was learnt as several
        vectors, as diffusers' textual inversion calls them."""
        ids, i = [token.id], 1
        while (more := self.tokens.get(f"{token.content}_{i}")) is not None:
            ids.append(more.id)
            i += 1
        return ids


def split_at(tokens: Iterable[AddedToken],
             normalise: Callable[[str], str]) -> tuple[AddedTokens, AddedTokens]:
    """Those that are found in the text as it was typed, and those in the normalised text."""
    tokens = list(tokens)
    normalised = [replace(token, content=normalise(token.content))
                  for token in tokens if token.normalized]
    return AddedTokens(token for token in tokens if not token.normalized), AddedTokens(normalised)
