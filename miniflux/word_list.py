"""Prompts for a small model that was taught few words, where its folder lists them (`words.json`).

A word that it was not taught becomes a blob, so the log names it, with the nearest word that it was
taught. A model without a list, such as the official ones, may be asked for anything.
"""

import logging
import re
from difflib import get_close_matches

from .flux import Flux

log = logging.getLogger("miniflux")
_named: set[tuple[str, str]] = set()     # (model, word): each is named once


def words_of(text: str) -> list[str]:
    """words_of("Two T-Rexes, 3 owls") = ["two", "t-rexes", "owls"]."""
    return re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text.lower().replace("'s", ""))


def unknown_words(words: frozenset[str], text: str) -> dict[str, str | None]:
    """The words of a prompt that are not among the given ones -> the nearest that is, if any.

    >>> unknown_words(frozenset(["a", "rocket"]), "a rockett dragon")
    {'rockett': 'rocket', 'dragon': None}"""
    unknown = [word for word in dict.fromkeys(words_of(text)) if word not in words]
    return {word: next(iter(get_close_matches(word, sorted(words), n=1, cutoff=0.75)), None)
            for word in unknown}


def warn_of_unknown_words(flux: Flux, prompt: str) -> None:
    """Name the words of a prompt that the model was not taught, each once."""
    if flux.config.words is None:
        return
    name = flux.config.name
    found = {word: near for word, near in unknown_words(flux.config.words, prompt).items()
             if (name, word) not in _named}
    if found:
        _named.update((name, word) for word in found)
        listed = ", ".join(f"{word} (near: {near})" if near else word
                           for word, near in found.items())
        log.warning('the model %s was not taught: %s; "miniflux tiny words %s" lists its words',
                    name, listed, name)
