"""Reading JSON, and writing files that are never half there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one sentence why not."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a JSON file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path`, which is renamed to it at the end.

    Whoever reads `path` meanwhile gets the old file or the new one; if writing fails, nothing is
    left behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
