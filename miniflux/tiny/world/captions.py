"""The captions of scenes: one canonical form, and the other ways in which people write the same.

    canonical     "a red apple to the left of a cat on a green background"
    others        "red apple left of cat on green background", "there are 3 cats at night", ...
"""

import random

from .grounds import PLAIN, SCENIC
from .styles import COLOURLESS, STYLES
from .words import article, enumerated, plural, synonym

NUMBERS = {2: "two", 3: "three", 4: "four"}
DIGITS = 0.25                            # the share of counts with "3" instead of "three"
WITHOUT_ARTICLES = 0.08                  # the share of captions as in "cat on blue background"
RELATIONS = {                            # relation of a pair: its forms in a caption
    "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
    "above": ("above",), "below": ("below", "below", "under"),
    "next to": ("next to", "beside"), "and": ("and",),
}
OVERLAPS = "in front of", "behind"
MEDIA = "a picture", "a picture", "an image", "a photo"


def where(ground: str, word: str) -> str:
    """where("gray", "grey") = "on a grey background", where("sea", "sea") = "in the sea"."""
    return SCENIC[ground][0] if ground in SCENIC else f"on {article(word)} background"


def canonical_form(phrase: str, ground: str, style: str | None) -> str:
    """canonical_form("a cat", "sea", None) = "a cat in the sea",
    canonical_form("a cat", "sea", "pixel art") = "pixel art of a cat in the sea"."""
    if style:
        return STYLES[style][0].format(_in_style(phrase, ground, ground, style))
    return f"{phrase} {where(ground, ground)}"


def name_objects(rng: random.Random, chosen: list[tuple[str, str | None]], kind: str, number: int,
                 relation: str | None, canonical: bool) -> str:
    """The phrase for the objects of a scene, each (name, colour), without the ground."""
    words = []
    for name, colour in chosen:
        noun = name if canonical else synonym(rng, name)
        words.append(f"{colour} {noun}" if colour else noun)
    if kind == "count":
        digits = not canonical and rng.random() < DIGITS
        return f"{number if digits else NUMBERS[number]} {plural(words[0])}"
    if kind in ("pair", "overlap"):
        forms = RELATIONS.get(relation, (relation,))
        return f"{article(words[0])} {rng.choice(forms)} {article(words[1])}"
    if kind in ("three", "four"):
        return enumerated(words)
    return article(words[0] if kind == "single" else f"{kind} {words[0]}")


def vary(rng: random.Random, phrase: str, ground: str, kind: str, style: str | None) -> str:
    """The canonical form three times of five; else a short form, a prefix, another order, or no
    word about the ground. Sometimes without articles."""
    word = synonym(rng, ground)
    full = f"{phrase} {where(ground, word)}"
    if style:
        caption = rng.choice(STYLES[style]).format(_in_style(phrase, ground, word, style))
    else:
        verb = "are" if kind == "count" else "is"
        bare = phrase.removeprefix("a ").removeprefix("an ")
        forms = {full: 60, f"{bare}, {word} background": 10, f"{rng.choice(MEDIA)} of {full}": 10,
                 f"{article(word)} background with {phrase}": 7, phrase: 8,
                 f"there {verb} {full}": 5}
        caption, = rng.choices(list(forms), list(forms.values()))
    return without_articles(caption) if rng.random() < WITHOUT_ARTICLES else caption


def without_articles(caption: str) -> str:
    """without_articles("a cat on a blue background") = "cat on blue background"."""
    return " ".join(word for word in caption.split() if word not in ("a", "an", "the"))


def _in_style(phrase: str, ground: str, word: str, style: str) -> str:
    """What a styled image shows. A pencil has no red: no words for a plain ground then."""
    bare = style in COLOURLESS and ground in PLAIN
    return phrase if bare else f"{phrase} {where(ground, word)}"
