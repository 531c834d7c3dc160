"""The benchmark: its command, its measurements, and the checkpoint that the table `disk` writes."""

import types

import pytest
import torch

from miniflux.bench import __main__ as bench
from miniflux.bench import disk, measuring
from miniflux.bench.attention import seconds_in_turn
from miniflux.checkpoints.layouts import load_mmdit
from miniflux.networks.mmdit import MMDiT, MMDiTConfig


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    bench.main()


def test_without_the_libraries_it_compares_with_it_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "lora", "offload", "int8")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert ("offload, int8 compare with diffusers: `pip install diffusers transformers`, or name "
            "other tables") in error


def test_an_unknown_table_is_refused_and_the_known_ones_are_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "speed")
    assert stop.value.code == 2
    assert "there is no table 'speed': expected some of picture, cold," in capsys.readouterr().err


def test_every_table_of_the_help_can_be_printed():
    described = [line.split()[0] for line in bench.__doc__.splitlines()
                 if line.startswith("    ") and not line.startswith("     ")]
    assert [name for name in described if name != "python"] == list(bench.BENCHES)
    assert set(bench.PEERS) < set(bench.BENCHES)


def test_every_repetition_of_attention_gets_a_fresh_tensor():
    """A way that overwrites its input, as `norm_rope` does, would otherwise measure its own output,
    whose weak channels decay into denormal numbers."""
    qkv, inputs = torch.rand(1, 4, 3, 2, 8), []

    def overwriting(x: torch.Tensor) -> torch.Tensor:
        inputs.append(x.clone())
        return x.mul_(1e-20)

    times = seconds_in_turn({"overwriting": overwriting, "reading": torch.sum}, qkv, seconds=0)
    assert len(inputs) >= 4 and all(torch.equal(x, qkv) for x in inputs)
    assert times.keys() == {"overwriting", "reading"} and min(times.values()) > 0


def test_calls_are_measured_in_turn_and_the_first_round_does_not_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def takes(name: str, *seconds: float):
        durations = iter(seconds)

        def call() -> None:
            order.append(name)
            clock[0] += next(durations)
        return call

    assert measuring.medians(takes("a", 99, 1, 2, 3), takes("b", 99, 5, 4, 9), runs=3) == [2, 5]
    assert order == list("abababab")


def test_a_function_runs_in_a_process_of_its_own():
    assert measuring.in_fresh_process(measuring.resident) > 0
    with pytest.raises(RuntimeError, match="resident failed in its own process"):
        measuring.in_fresh_process(measuring.resident, "one argument too many")


@pytest.fixture
def checkpoint(tmp_path):
    with torch.device("meta"):
        net = MMDiT(MMDiTConfig(context_in_dim=64, vec_in_dim=24, hidden_size=256, num_heads=2,
                                depth=1, depth_single_blocks=1))
    disk.write_random(tmp_path / "flux1.safetensors", net)
    return tmp_path / "flux1.safetensors"


def test_the_random_checkpoint_of_the_table_disk_can_be_loaded(checkpoint):
    for p in load_mmdit(checkpoint).parameters():
        assert p.dtype == torch.bfloat16 and p.isfinite().all() and p.abs().max() < 0.2


def test_too_little_space_for_the_table_disk_is_refused_before_it_writes(monkeypatch):
    usage = types.SimpleNamespace(free=30e9)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage)
    message = "the table disk writes 33 GB, and .* has 30 GB free: set TMPDIR"
    with pytest.raises(SystemExit, match=message):
        disk.bench_disk("")
