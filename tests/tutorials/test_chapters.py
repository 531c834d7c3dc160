"""The shape of a chapter, and what must not rot in it. That its code does what it promises is the
business of `pytest tutorials`."""

import ast
import re
import runpy
from itertools import combinations
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
CHAPTERS = sorted(TUTORIALS.glob("[0-9]*.md"))
HEADINGS = ["The idea", "From nothing", "Look inside", "What goes wrong", "Before you go on",
            "Read next", "Exercises"]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)\n```$", re.MULTILINE | re.DOTALL)

each = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


def code(chapter: Path, language: str = "python") -> list[str]:
    return [body for kind, body in FENCE.findall(chapter.read_text("utf-8")) if kind == language]


def prose(chapter: Path) -> str:
    """The text without fences, mathematics and code."""
    text = FENCE.sub("", chapter.read_text("utf-8"))
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


@each
def test_a_chapter_has_its_table_and_its_headings_in_order(chapter):
    text = chapter.read_text("utf-8")
    assert text.startswith(f"# {int(chapter.stem[:2])}. ")
    assert "| The question | You need | It takes | It reads |" in text
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    table, cover = text.index("| The question"), text.index("![")
    assert table < cover < text.index("## The idea"), "the cover stands between table and idea"


@each
def test_a_chapter_can_be_read_in_one_sitting(chapter):
    words = len(re.findall(r"[A-Za-z][\w'-]*", prose(chapter)))
    assert 1_200 <= words <= 2_500, f"{words} words"
    fences = code(chapter)
    assert sum(len(body.split("\n")) for body in fences) <= 220
    assert max(len(body.split("\n")) for body in fences) <= 30
    too_wide = [line for body in fences for line in body.split("\n") if len(line) > 88]
    assert not too_wide, too_wide


@each
def test_what_a_chapter_writes_is_compared_with_the_package(chapter):
    """Some fence checks equality, and uses for it what was imported from miniflux."""
    imported, compared = set(), False
    for body in code(chapter):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "miniflux":
                imported |= {name.asname or name.name for name in node.names}
        names = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
        equality = "torch.equal" in body or "assert_close" in body or "allclose" in body
        compared |= equality and bool(names & (imported - {"show", "plot"}))
    assert compared


@each
def test_a_chapter_draws_at_least_two_figures_and_one_of_them_broken(chapter):
    text = chapter.read_text("utf-8")
    drawn = [match.end() for match in re.finditer(r"^```\n!\[", text, re.MULTILINE)]
    assert len(drawn) >= 2
    begin, end = text.index("## What goes wrong"), text.index("## Before you go on")
    assert any(begin < position < end for position in drawn)


@each
def test_a_chapter_has_at_least_three_exercises_that_exist(chapter):
    section = chapter.read_text("utf-8").partition("## Exercises")[2]
    path, = set(re.findall(r"\]\((exercises/\w+\.py)\)", section))
    items = re.findall(r"^\d+\. (★+) \*\d+ minutes\.\* \*\*(.+?)\.?\*\*", section, re.MULTILINE)
    headings = re.findall(r"^# -+ \d+\. (★+) (.*), \d+ min",
                          (TUTORIALS / path).read_text("utf-8"), re.MULTILINE)
    assert len(items) >= 3
    assert [(stars, title.rstrip("?")) for stars, title in items] == headings


@each
def test_numbers_in_prose_are_computed(chapter):
    """A number with a decimal point, a per cent sign or three digits needs `<!-- = ... -->`."""
    text = prose(chapter)
    text = re.sub(r"<!-- = .*? -->[-+−\d.,]+", "", text, flags=re.DOTALL)
    excused = r"^\|.*\|$|^# .*$|\]\([^)]*\)|arXiv:[\d.]+|\b(?:1[89]|20)\d\d\b|FLUX\.1"
    text = re.sub(excused, "", text, flags=re.MULTILINE)
    found = re.findall(r"\d+\.\d+|\d{3,}|\d+ ?%", text)
    allowed = {"128", "256", "512", "768", "3072", "4096"}              # sizes of the models
    assert not set(found) - allowed, found


@each
def test_a_computed_number_does_not_begin_a_line(chapter):
    """Markdown takes a comment at the beginning of a line for a block, and ends the paragraph."""
    assert not re.findall(r"^\s*<!-- = ", chapter.read_text("utf-8"), re.MULTILINE)


@each
def test_relative_links_and_images_exist(chapter):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", chapter.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (TUTORIALS / target).exists(), target


def test_no_code_is_copied_from_chapter_to_chapter():
    functions = {chapter: {node.name for body in code(chapter) for node in ast.walk(ast.parse(body))
                           if isinstance(node, ast.FunctionDef)} for chapter in CHAPTERS}
    for a, b in combinations(CHAPTERS, 2):
        assert not functions[a] & functions[b], (a.name, b.name)
        assert not six_lines(a) & six_lines(b), (a.name, b.name)


def six_lines(chapter: Path) -> set[tuple[str, ...]]:
    """Every run of six lines of code."""
    runs = set()
    for body in code(chapter):
        lines = [line.strip() for line in body.split("\n") if line.strip()]
        runs |= {tuple(lines[i:i + 6]) for i in range(len(lines) - 5)}
    return runs


def test_images_are_small_and_all_are_used():
    used = {name for chapter in [*CHAPTERS, TUTORIALS / "README.md"]
            for name in re.findall(r"\((images/[^)]+)\)", chapter.read_text("utf-8"))}
    images = (TUTORIALS / "images").iterdir()
    files = {f"images/{path.name}": path.stat().st_size for path in images}
    assert used == set(files)
    assert max(files.values()) <= 60_000
    assert sum(path.stat().st_size for path in TUTORIALS.rglob("*") if path.is_file()) <= 3_000_000


@each
def test_a_chapter_becomes_a_notebook_without_its_promises(chapter):
    nbformat = pytest.importorskip("nbformat")
    script = runpy.run_path(str(TUTORIALS / "notebooks.py"))
    notebook = script["notebook"](chapter)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert cells == code(chapter) and not any("%%" in cell for cell in cells)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "```text" not in text and "<!-- =" not in text
