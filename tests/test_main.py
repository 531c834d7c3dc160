"""The console command `miniflux`. Oracle: by hand."""

import importlib.util
import subprocess
import sys

import pytest

import miniflux
from miniflux import __main__ as console


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["miniflux", *words])
    console.main()


def test_every_command_has_a_module_with_a_main_function():
    for module, _ in console.COMMANDS.values():
        spec = importlib.util.find_spec(f"miniflux.{module}")
        assert spec is not None, module


def test_help_lists_every_command_with_one_line(monkeypatch, capsys):
    run(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in console.COMMANDS) and len(text.splitlines()[0]) < 80
    run(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == miniflux.__version__


@pytest.mark.parametrize("words", [("generate",), ("tiny", "train")])
def test_a_command_runs_the_file_it_lives_in(words):
    result = subprocess.run([sys.executable, "-m", "miniflux", *words, "--help"],
                            capture_output=True, text=True)
    assert result.returncode == 0 and "usage" in result.stdout


def test_an_unknown_command_gets_one_sentence_and_the_nearest_name(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "genrate", "a fox")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "did you mean generate?" in error


def test_a_task_module_imported_by_its_name_is_the_function_with_the_modules_names():
    import miniflux.generate as g
    from miniflux import generate
    assert g is generate and callable(g.sample) and g.sample.__module__ == "miniflux.generate"
