"""What all tokenizers share: checking a text, padding rows of tokens, remembering words."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch

# Unicode's White_Space. Note: Python's \\s also counts the separators U+001C..U+001F.
SPACE = ("\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
         + "\u2028\u2029\u202f\u205f\u3000")
CACHE_SIZE = 50_000      # words that a tokenizer remembers

Value = TypeVar("Value")


def check_text(text: str) -> None:
    """Refuses what is no text, in one sentence."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a str, got {type(text).__name__}: {text!r:.60}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("the prompt has a lone surrogate, which is no character, "
                         f"expected valid Unicode: {text!r:.60}")


def remembered(cache: dict[str, Value], key: str, compute: Callable[[str], Value]) -> Value:
    """cache[key], computed when it is not there yet; a full cache is emptied first.

    The cache belongs to a tokenizer and dies with it. Prompts repeat their words."""
    value = cache.get(key)
    if value is None:
        if len(cache) >= CACHE_SIZE:
            cache.clear()
        value = cache[key] = compute(key)
    return value


def pad_and_truncate(encode: Callable[[str], list[int]], texts: list[str], length: int,
                     start: list[int], end: int, pad: int) -> torch.Tensor:
    """`start`, the tokens of each text, `end`, then `pad` up to `length`: (B, length).

    Note: truncation cuts the tokens of the text; the end token always stays.
    """
    if not isinstance(texts, (list, tuple)):
        kind = type(texts).__name__
        raise ValueError(f"texts must be a list of strings, got {kind}: {texts!r:.60}")
    room = length - len(start) - 1
    if room < 0:
        raise ValueError(f"length must be at least {len(start) + 1}, to hold the special tokens, "
                         f"got {length}")
    rows = [[*start, *encode(text)[:room], end] for text in texts]
    rows = [row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)     # also for B = 0
