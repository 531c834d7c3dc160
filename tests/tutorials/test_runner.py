"""The runner of the chapters sees what rots: a chapter in which one thing was changed fails once,
at its place; `--update` mends what was printed, drawn and computed, and nothing else."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
CHAPTER = """# 1. A chapter

```python
from miniflux.figures import plot
x = 0.25
print("x is", x)
```
```text
x is 0.25
```

Its square is <!-- = x * x -->0.0625, and it costs <!-- = 1234 -->1,234.

```python
plot("x", "y").bar([0, 1], [1, 0])
```
![a bar](images/left.webp)

```python
plot("x", "y").bar([0, 1], [0, 1])
```
![a bar](images/right.webp)
"""


def pytest_of(folder: Path, *arguments: str) -> list[str]:
    """The lines of a run of pytest in that folder, without colours."""
    environment = os.environ | {"PYTHONPATH": str(TUTORIALS.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", *arguments, "."],
        cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout.split("\n")


def outcomes(lines: list[str]) -> dict[str, int]:
    kinds = "PASSED", "FAILED", "SKIPPED"
    return {kind: sum(line.startswith(kind) for line in lines) for kind in kinds}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    shutil.copy(TUTORIALS / "conftest.py", folder)
    (folder / "01-chapter.md").write_text(CHAPTER, "utf-8")
    assert outcomes(pytest_of(folder, "--update"))["FAILED"] == 0
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def change(folder: Path, old: str, new: str) -> None:
    chapter = folder / "01-chapter.md"
    assert chapter.read_text("utf-8").count(old) == 1
    chapter.write_text(chapter.read_text("utf-8").replace(old, new), "utf-8")


def test_a_chapter_that_is_right_passes_and_updating_leaves_it_alone(folder):
    assert outcomes(pytest_of(folder)) == {"PASSED": 8, "FAILED": 0, "SKIPPED": 0}
    assert (folder / "01-chapter.md").read_text("utf-8") == CHAPTER


@pytest.mark.parametrize("old, new, message", [
    ("x is 0.25\n", "x is 0.27\n", "promised:"), ("x is 0.25\n", "y is 0.25\n", "promised:"),
    ("-->0.0625", "-->0.0627", "the text has 0.0627"), ("-->1,234", "-->1,235", "1,235")])
def test_a_changed_promise_is_one_failure_and_is_mended_by_update(folder, old, new, message):
    change(folder, old, new)
    lines = pytest_of(folder)
    assert outcomes(lines) == {"PASSED": 7, "FAILED": 1, "SKIPPED": 0}
    assert any(message in line for line in lines)
    pytest_of(folder, "--update")
    assert (folder / "01-chapter.md").read_text("utf-8") == CHAPTER


def test_exchanged_figures_are_two_failures(folder):
    left, right = folder / "images" / "left.webp", folder / "images" / "right.webp"
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)
    assert outcomes(pytest_of(folder)) == {"PASSED": 6, "FAILED": 2, "SKIPPED": 0}


def test_what_follows_an_error_is_skipped_and_not_failed_too(folder):
    change(folder, "x = 0.25", "x = 1 / 0")
    counts = outcomes(pytest_of(folder))
    assert counts["FAILED"] == 1 and counts["PASSED"] == 0


def test_one_fence_alone_runs_those_that_it_needs(folder):
    lines = pytest_of(folder, "-k", "line:8")
    assert outcomes(lines) == {"PASSED": 1, "FAILED": 0, "SKIPPED": 0}


@pytest.mark.parametrize("promised, printed, equal", [
    ("0.25", "0.26", True), ("0.25", "0.27", False), ("0.250", "0.26", False), ("7", "8", False),
    ("3e-5", "4e-5", True), ("3e-5", "5e-5", False), ("a 1.0", "b 1.0", False),
    ("1.0 ... end", "1.7 and the end", True), ("1.0", "1.0 2.0", False)])
def test_numbers_hold_to_the_last_digit_that_is_written(promised, printed, equal):
    assert runpy.run_path(str(TUTORIALS / "conftest.py"))["same"](promised, printed) is equal
