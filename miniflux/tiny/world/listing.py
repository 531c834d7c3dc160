"""The command that lists the words which a prompt for a small model may contain.

    miniflux tiny words            the words of the world
    miniflux tiny words tiny       those that the model tiny was taught
"""

import textwrap
from collections.abc import Iterable

from ...checkpoints.configs import read_words
from ...checkpoints.finding import find_source
from ...command import Parser, command, say
from .captions import NUMBERS, OVERLAPS, RELATIONS
from .glyphs import COLOURS
from .grounds import SCENIC
from .styles import STYLES
from .words import OBJECTS, RECOLOURABLE, SYNONYMS


def groups() -> dict[str, Iterable[str]]:
    """The words of the world by their kind."""
    def also(word: str) -> str:
        return f"{word} ({', '.join(SYNONYMS[word])})" if word in SYNONYMS else word

    forms = dict.fromkeys(form for group in RELATIONS.values() for form in group)
    return {
        "objects": map(also, sorted(OBJECTS)), "colours": map(also, COLOURS),
        "with a colour": sorted(name for name in OBJECTS if name in RECOLOURABLE),
        "backgrounds": ["on a (any colour) background", *(form for form, _ in SCENIC.values())],
        "sizes": ("big", "small"), "numbers": [*NUMBERS.values(), "or digits"],
        "relations": [*forms, *OVERLAPS], "styles": STYLES,
    }


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="miniflux tiny words",
                    description="List the words that a prompt may contain.")
    parser.add_argument("model", nargs="?",
                        help="a model, for the words that it was taught (default: the world's)")
    args = parser.parse_args(argv)
    lines = groups()
    if args.model:
        try:
            words = read_words(find_source(args.model))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        if words is None:
            parser.error(f"the model {args.model} has no list of words: it takes any prompt")
        lines = {"words": sorted(words)}
    for what, words in lines.items():
        say(textwrap.fill(f"{what:14} {', '.join(words)}", 96, subsequent_indent=15 * " "))


if __name__ == "__main__":
    main()
