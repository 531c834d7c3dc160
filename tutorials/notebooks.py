"""The chapters as notebooks, for Jupyter and Colab.

    python tutorials/notebooks.py [FOLDER]

What a chapter promises (printed text, drawn figures) is left out: running the notebook makes it.
Images that are not promises, and links to files, still point to the folder of the chapters.
"""

import re
import sys
from pathlib import Path

import jupytext

HERE = Path(__file__).parent
PROMISE = re.compile(r"(?<=^```\n)(?:```text\n.*?\n```|!\[[^\]]*\]\(images/[^)]+\))\n",
                     re.MULTILINE | re.DOTALL)
COMPUTED = re.compile(r"<!-- = .*? -->", re.DOTALL)


def notebook(chapter: Path):
    """The chapter as a notebook: one cell per fence, without what running it shows again."""
    text = chapter.read_text("utf-8")
    while (shorter := PROMISE.sub("", text)) != text:       # a figure may stand below a text
        text = shorter
    return jupytext.reads(COMPUTED.sub("", text), fmt="md")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    for chapter in sorted(HERE.glob("[0-9]*.md")):
        path = folder / chapter.with_suffix(".ipynb").name
        jupytext.write(notebook(chapter), path)
        print(path)


if __name__ == "__main__":
    main()
