"""Collects the exercises when this folder is asked for: `pytest tutorials/exercises`.

One file alone is `pytest tutorials/exercises/attention.py`. Plain `pytest` and `pytest tutorials`
leave them out, since an exercise that nobody has solved yet fails."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    asked = any(Path(argument).resolve() == HERE for argument in parent.config.args)
    if asked and file_path.suffix == ".py" and file_path.name != "conftest.py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None
