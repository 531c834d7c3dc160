"""Which stages are to be resumed, and how far each one is.

    python -m miniflux.tiny.train status --work tiny-training
"""

import json
import shlex
import time
from pathlib import Path

from safetensors import safe_open

RUN = "run.json"                         # in a stage's folder: its arguments and its length


def write_run(folder: Path, arguments: list[str], minutes: float | None, steps: int | None) -> None:
    """Note how a stage was started, so that it can be resumed the same way."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {"arguments": arguments, "minutes": minutes, "steps": steps}
    (folder / RUN).write_text(json.dumps(run), "utf-8")


def describe_stage(folder: Path) -> str:
    """One line: "base: 31 of 78 minutes, step 4200, loss 0.31; resume: python -m ..."."""
    run = json.loads((folder / RUN).read_text("utf-8"))
    states = sorted(folder.glob("**/state.safetensors"), key=lambda path: path.stat().st_mtime)
    command = "resume: python -m miniflux.tiny.train " + shlex.join(run["arguments"])
    if not states:
        return f"{folder.name}: no state saved yet; {command}"
    step, seconds, done = 0, 0.0, False
    for path in states:                  # some stages have parts, each with a state of its own
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        step += int(meta["step"])
        seconds += float(meta["seconds"])
    done = step >= run["steps"] if run["steps"] else seconds >= 60 * run["minutes"]
    length = f"of {run['steps']} steps" if run["steps"] else f"of {run['minutes']:g} minutes"
    so_far = f"{step} {length}" if run["steps"] else f"{seconds / 60:.0f} {length}, step {step}"
    age = (time.time() - states[-1].stat().st_mtime) / 60
    loss = last_value(states[-1].parent / "log.jsonl", "loss")
    words = f"{folder.name}: {so_far}, loss {loss:.4f}, saved {age:.0f} minutes ago"
    return f"{words}; done" if done else f"{words}; {command}"


def last_value(log: Path, key: str) -> float:
    """The newest value of a key in a log of JSON lines; NaN where there is none."""
    values = [json.loads(line).get(key) for line in log.read_text("utf-8").splitlines()]
    return next((value for value in reversed(values) if value is not None), float("nan"))


def show(work: Path) -> None:
    """A line for each stage that was started below `work`."""
    folders = sorted(path.parent for path in work.glob(f"*/{RUN}"))
    if not folders:
        raise FileNotFoundError(f"no stage of training was started in {work}")
    print("\n".join(describe_stage(folder) for folder in folders))
