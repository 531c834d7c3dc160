"""The exercises are checked themselves: a stub fails, the solution passes, and every planted wrong
answer is refused with a sentence that helps."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = ROOT / "tutorials" / "exercises"
SOLUTIONS = Path(__file__).parent / "solutions"
NAMES = sorted(path.stem for path in EXERCISES.glob("*.py") if path.stem != "conftest")


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercise(name: str) -> ModuleType:
    return load_file(EXERCISES / f"{name}.py")


def solved(name: str) -> ModuleType:
    """The exercises with every stub replaced by its solution."""
    module, answers = exercise(name), load_file(SOLUTIONS / f"{name}.py")
    for stub in stubs(module):
        setattr(module, stub, getattr(answers, stub))
    return module


def stubs(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value)
            and "raise NotImplementedError" in inspect.getsource(value)]


def checks(module: ModuleType) -> list:
    return [value for name, value in vars(module).items() if name.startswith("test_")]


def complaints(module: ModuleType) -> list[str]:
    """What the checks object to."""
    found = []
    for check in checks(module):
        try:
            check()
        except AssertionError as error:
            found.append(str(error))
    return found


WRONG = [(name, stub, answer, sentence) for name in NAMES
         for stub, answers in load_file(SOLUTIONS / f"{name}.py").WRONG.items()
         for answer, sentence in answers.items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_fails(name):
    for check in checks(exercise(name)):
        with pytest.raises(NotImplementedError):
            check()


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    for check in checks(solved(name)):
        check()


@pytest.mark.parametrize("name, stub, answer, sentence", WRONG,
                         ids=[f"{name}-{answer.__name__}" for name, _, answer, _ in WRONG])
def test_a_wrong_answer_is_refused_with_a_sentence(name, stub, answer, sentence):
    module = solved(name)
    setattr(module, stub, answer)
    found = complaints(module)
    assert found, f"{answer.__name__} passes all checks of {stub}"
    assert any(sentence in complaint for complaint in found), found


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_has_wrong_answers_stars_and_minutes(name):
    module, answers = exercise(name), load_file(SOLUTIONS / f"{name}.py")
    assert set(answers.WRONG) == set(stubs(module))
    assert all(len(wrong) >= 2 for wrong in answers.WRONG.values())
    headings = re.findall(r"^# -+ \d+\. ★+ .*, \d+ minutes$", inspect.getsource(module), re.M)
    assert len(headings) == len(stubs(module)) >= 3
