"""Runs the chapters: what a chapter promises is what its code does.

    pytest tutorials                 each fence is a test; the fences of a chapter share their names
    pytest tutorials --update        writes what was printed, drawn and computed into the chapters

A `python` fence is executed. A `text` fence right below it is what it printed: words exactly,
numbers to the last digit that is written there, "..." stands for anything. An image right below it
is the figure it drew. In the prose, `<!-- = expression -->12.3` is a number that is computed.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
PROMISE = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<=^```\n)!\[[^\]]*\]\((images/[^)]+\.webp)\)$", re.MULTILINE)
IN_PROSE = re.compile(r"(?<=<!-- = )(.*?) -->([-+−]?\d[\d,]*(?:\.\d+)?)", re.DOTALL)
ALIKE = 0.015              # mean difference, of [0, 1], between two drawings of the same figure
LARGEST = 60_000           # bytes of an image


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true",
                     help="write what is printed, drawn and computed into the chapters")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `pytest -n 2 --dist loadgroup` each chapter runs in one process."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update")


def start_chapter(namespace: dict) -> None:
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_grad_enabled(True)


class Progress:
    """How far a chapter has been executed, and what is to be written into it."""

    def __init__(self, document: Document):
        self.document = document
        self.fences = [e for e in document.examples() if e.region.evaluator is run]
        self.printed: dict[int, str] = {}           # start of a fence -> what it printed
        self.broken = False
        self.edits: dict[int, tuple[int, str]] = {}

    @staticmethod
    def of(example: Example) -> "Progress":
        """The progress of the example's chapter, with all its earlier fences executed.

        So a single fence can be tested by `pytest tutorials -k line:120`, or in another process."""
        document = example.document
        if not hasattr(document, "progress"):
            document.progress = Progress(document)
        progress = document.progress
        for fence in progress.fences:
            if fence.start < example.start:
                progress.execute(fence)
        return progress

    def execute(self, fence: Example) -> None:
        if self.broken:
            pytest.skip("a fence before this one failed")
        if fence.start in self.printed:
            return
        self.broken, printed = True, io.StringIO()
        with contextlib.redirect_stdout(printed):
            PythonEvaluator()(fence)
        self.broken, self.printed[fence.start] = False, printed.getvalue().strip()

    def last_print(self, example: Example) -> str:
        return self.printed[max(start for start in self.printed if start < example.start)]

    def write(self, start: int, end: int, new: str) -> None:
        """Replaces a part of the chapter; positions are those of the text that was collected."""
        self.edits[start] = end, new
        text, position = "", 0
        for begin, (stop, replacement) in sorted(self.edits.items()):
            text += self.document.text[position:begin] + replacement
            position = stop
        Path(self.document.path).write_text(text + self.document.text[position:], "utf-8")


def run(example: Example) -> None:
    Progress.of(example).execute(example)


def last_digit(number: str) -> float:
    """What one step of the last digit is worth: "0.25" -> 0.01, "3e-5" -> 1e-5, "7" -> 0."""
    if not set(number) & set(".e"):
        return 0.0
    mantissa, _, power = number.partition("e")
    return 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))


def same(promised: str, printed: str) -> bool:
    """Words exactly, numbers to the last digit that is promised, "..." for anything."""
    parts = promised.split("...")
    pattern = ".*?".join(re.escape(NUMBER.sub("#", part)) for part in parts)
    if not re.fullmatch(pattern, NUMBER.sub("#", printed), re.DOTALL):
        return False
    if len(parts) > 1:
        return True
    pairs = zip(NUMBER.findall(promised), NUMBER.findall(printed))
    return all(abs(float(a) - float(b)) <= 1.01 * last_digit(a) for a, b in pairs)


def compare_text(example: Example) -> None:
    promised, printed = example.parsed, Progress.of(example).last_print(example)
    if example.namespace["update"]:
        Progress.of(example).write(example.start, example.end, f"```text\n{printed}\n```")
    else:
        assert same(promised, printed), f"promised:\n{promised}\n\nprinted:\n{printed}"


def compare_figure(example: Example) -> None:
    import matplotlib.pyplot as plt

    Progress.of(example)
    path, buffer = Path(example.path).parent / example.parsed, io.BytesIO()
    assert plt.get_fignums(), "the fence before this image drew no figure"
    plt.gcf().savefig(buffer, format="png", dpi=plt.gcf().dpi)
    plt.close("all")
    if example.namespace["update"]:
        path.parent.mkdir(exist_ok=True)
        Image.open(buffer).convert("RGB").save(path, quality=82, method=6)
        size = path.stat().st_size
        assert size <= LARGEST, f"{path.name} has {size} bytes: at most {LARGEST} are allowed"
        return
    drawn, shown = (small_copy(source) for source in (buffer, path))
    difference = np.abs(drawn - shown).mean()
    assert difference < ALIKE, f"{path.name} differs by {difference:.3f} from what is drawn here"


def small_copy(source: io.BytesIO | Path) -> np.ndarray:
    image = Image.open(source).convert("RGB").resize((160, 120), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def compare_number(example: Example) -> None:
    expression, written = example.parsed
    Progress.of(example)
    value = eval(expression, example.namespace)
    value = value if isinstance(value, int) else float(value)
    promised = written.replace(",", "").replace("−", "-")
    decimals = len(promised.partition(".")[2])
    if example.namespace["update"]:
        new = f"{value:{',' if ',' in written else ''}.{decimals}f}"
        Progress.of(example).write(example.start, example.end, f"{expression} -->{new}")
        return
    allowed = 0 if isinstance(value, int) else 1.01 * 10.0**-decimals
    difference = abs(float(promised) - value)
    assert difference <= allowed, f"the text has {written}, but {expression} is {value}"


def texts(document: Document) -> Iterator[Region]:
    for match in PROMISE.finditer(document.text):
        yield Region(match.start(), match.end(), match[1].strip(), compare_text)


def figures(document: Document) -> Iterator[Region]:
    for match in FIGURE.finditer(document.text):
        yield Region(match.start(), match.end(), match[1], compare_figure)


def numbers(document: Document) -> Iterator[Region]:
    for match in IN_PROSE.finditer(document.text):
        yield Region(match.start(), match.end(), (match[1], match[2]), compare_number)


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", run), texts, figures, numbers],
    pattern="[0-9]*.md", fixtures=["update"], setup=start_chapter).pytest()
