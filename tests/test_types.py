"""What a type checker sees of the public names. Oracle: mypy, on a user's program."""

import re
import subprocess
import sys
from pathlib import Path

import miniflux

PROGRAM = '''
from miniflux import fill, generate, load
flux = load("tiny")
generate(flux, "a fox", steps=4, seed=7, on_step=lambda step, t, x: None)
fill(flux, "a fox", "a.png", "m.png", paste_back=True, steps=4)
generate(flux, "a fox", stepz=4)
generate(flux, 7)
fill(flux, "a fox", "a.png", "m.png", controlnet=None)
'''


def test_the_stub_names_what_the_package_offers():
    stub = (Path(miniflux.__file__).parent / "__init__.pyi").read_text("utf-8")
    assert set(re.findall(r"(\w+) as \1\b", stub)) == set(miniflux._NAMES)


def test_a_type_checker_finds_unknown_keywords_and_wrong_types_of_a_task(tmp_path):
    """Right calls pass; a misspelt keyword, a prompt that is no text, and a keyword of another task
    do not."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, "utf-8")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports",
               "--cache-dir", str(tmp_path / "cache"), str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = {int(n) for n in re.findall(r"program.py:(\d+): error", result.stdout)}
    assert lines == {6, 7, 8}, result.stdout + result.stderr
