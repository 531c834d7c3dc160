"""What the tables share: medians of calls in turn, peak memory of a fresh process, one layout.

Calls are measured in turn, round by round, so that what slows the machine slows all of them alike.
"""

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "a red apple on a blue background"
STEPS = 28


def medians(*calls: Callable[[], object], runs: int = 15) -> list[float]:
    """The median seconds of each call, in `runs` rounds after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 1):
        for call, seconds in zip(calls, times):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in times]


def in_fresh_process(function: Callable, *arguments) -> Any:
    """Calls a function of this package in a process of its own.

    function: a function at the top of its module.
    arguments: its arguments; they and what it returns must be values that JSON has."""
    code = (f"import json, sys; from {function.__module__} import {function.__name__} as function; "
            "print(json.dumps(function(*json.loads(sys.argv[1]))))")
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{function.__name__} failed in its own process:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def resident() -> int:
    """Bytes of memory that this process has now (Linux)."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes of memory that this process had since `reset_peak`, or its start (Linux)."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(field + r":\s+(\d+)", text)[1])


def processor() -> str:
    """The name of the processor, such as "AMD EPYC 7B13"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def table(title: str, rows: list[tuple[str, float, float]], unit: str) -> None:
    """Prints rows (name, ours, the peer's) with their ratio."""
    print(f"\n{title:36} {'miniflux':>12} {'diffusers':>12} {'ratio':>8}")
    for name, ours, theirs in rows:
        print(f"{name:36} {ours:9.1f} {unit:2} {theirs:9.1f} {unit:2} {theirs / ours:7.2f}x")
