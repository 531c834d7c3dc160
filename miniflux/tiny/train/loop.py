"""One training loop for everything that is trained here: resumable, reproducible, watched.

    for each step:
        loss = loss_of(generator)
        loss.backward()
        optimizer.step()
        average the weights

Each step draws its random numbers from a generator seeded with (seed, step), so a run that was
stopped and resumed goes exactly the way it would have gone. The length of a run is given in steps,
or in minutes of training, counted over all restarts. Ctrl-C saves the state and stops.

Started by torchrun as one of N processes, each draws numbers of its own, and all take the mean of
their gradients: the batch is N times as large. The first process keeps the time; it alone writes.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ...engine.distributed import is_distributed, is_rank_zero
from ...files import atomic_write
from ...imaging.saving import save
from ..world.rendering import contact_sheet
from .optimizers import make_optimizers

WARMUP = 100                             # steps in which the learning rate rises
LOG_EVERY = 20                           # steps between two entries of the log
DECAY_FROM = 0.75                        # of the run: from there on the learning rate falls to zero
BAR = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"


def learning_rate_factor(progress: float, step: int) -> float:
    """Rises for `WARMUP` steps, stays, and falls linearly to zero after `DECAY_FROM` of the run;
    progress in [0, 1]."""
    return min((step + 1) / WARMUP, 1.0) * min((1 - progress) / (1 - DECAY_FROM), 1.0)


class Interruption:
    """In `with Interruption() as i`, Ctrl-C or SIGTERM sets `i.asked`; the step ends first."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interruption":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_) -> None:
        self.asked = True

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def average(tensors: list[Tensor], processes: int) -> None:
    """Replace each tensor by its mean over all processes, in place."""
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joined)
    means = joined.div_(processes).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means):
        tensor.copy_(mean.view_as(tensor))


def broadcast(seconds: float, stop: bool, device: torch.device) -> tuple[float, bool]:
    """The first process's time and wish to stop, for all: they must agree on both."""
    first = torch.tensor([seconds, float(stop)], dtype=torch.float64, device=device)
    dist.broadcast(first, 0)
    return float(first[0]), bool(first[1])


def save_state(path: Path, net: nn.Module, ema: dict[str, Tensor], optimizers: list, step: int,
               seconds: float) -> None:
    """Everything a run needs to go on, in one safetensors file, replaced in one stroke."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for i, optimizer in enumerate(optimizers):
        for j, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in entries.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, {"step": str(step), "seconds": str(seconds)})


def load_state(path: Path, net: nn.Module, ema: dict[str, Tensor], optimizers: list
               ) -> tuple[int, float]:
    """Restores what `save_state` wrote; returns (step, seconds)."""
    with safe_open(path, "pt") as file:
        tensors, meta = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    for k in ema:
        ema[k].copy_(tensors[f"ema.{k}"])
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, j, entry = name.split(".")
                state["state"].setdefault(int(j), {})[entry] = value
        optimizer.load_state_dict(state)
    return int(meta["step"]), float(meta["seconds"])


class Meter:
    """Loss and speed of a run: in a bar, in the log, and on stdout where there is no bar."""

    def __init__(self, folder: Path, length: float, start: float, samples: int, step: int):
        self.log = folder / "log.jsonl"
        self.samples = samples                               # in a step, of all processes
        self.losses: list[Tensor] = []
        self.last = (step, time.monotonic())                 # the speed is counted from here
        self.bar = tqdm(total=length, initial=start, desc=folder.name, bar_format=BAR,
                        disable=None if is_rank_zero() else True)

    def advance(self, done: float) -> None:
        """Move the bar to `done`, in the unit of the run's length."""
        self.bar.update(min(done, self.bar.total) - self.bar.n)

    def add(self, step: int, seconds: float, loss: Tensor) -> None:
        """Note the loss of a step; of the first and of every twentieth write an entry."""
        self.losses.append(loss)
        if step > 1 and step % LOG_EVERY:
            return
        mean, now = float(torch.stack(self.losses).mean()), time.monotonic()
        speed = (step - self.last[0]) * self.samples / max(now - self.last[1], 1e-9)
        self.last, self.losses = (step, now), []
        if is_rank_zero():
            self.bar.set_postfix_str(f"loss {mean:.4f}, {speed:.1f} samples/s")
            self.write(step=step, seconds=round(seconds, 1), loss=mean,
                       samples=step * self.samples, samples_per_s=round(speed, 2))
        if not math.isfinite(mean):
            raise ValueError(f"the loss became {mean} at step {step}: lower the learning rate")

    def write(self, **entry: object) -> None:
        """Append an entry to the log, in JSON lines."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.bar.disable:
            words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                     for k, v in entry.items())
            print(" ".join(words), flush=True)


def train(net: nn.Module, loss_of: Callable[[torch.Generator], Tensor], folder: Path, *, lr: float,
          batch: int = 1, steps: int | None = None, minutes: float | None = None, seed: int = 0,
          ema_decay: float = 0.999, save_minutes: float = 10,
          before_step: Callable[[int], None] | None = None,
          on_save: Callable[[int, dict[str, Tensor]], dict] | None = None) -> dict[str, Tensor]:
    """Minimise loss_of(generator) over the weights of `net`; returns their running average.

    folder: of the state, the log in JSON lines, and whatever `on_save` writes.
    lr: the learning rate of both optimizers.
    batch: samples in a step, of one process; for the figures alone.
    steps, minutes: the length of the run, one of the two.
    seed: of the random numbers of all steps.
    save_minutes: minutes between two saved states.
    before_step(step): called before each step with its number, from 0.
    on_save(step, averaged weights): entries for the log, such as a figure of merit.

    Raises KeyboardInterrupt after Ctrl-C, with the state saved, and ValueError where the loss is
    not finite."""
    if (steps is None) == (minutes is None):
        raise ValueError(f"give either steps or minutes, got steps={steps} and minutes={minutes}")
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.safetensors"
    optimizers = make_optimizers(net, lr)
    learnt = [p for p in net.parameters() if p.requires_grad]
    rank, processes = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()}
    step, seconds = load_state(state, net, ema, optimizers) if state.exists() else (0, 0.0)
    began, saved = time.monotonic() - seconds, seconds
    length = steps or 60 * minutes
    meter = Meter(folder, length, step if steps else seconds, batch * processes, step)

    def keep(seconds: float, shown: bool) -> None:
        save_state(state, net, ema, optimizers, step, seconds)
        if on_save and shown:
            # Note: sample sheets have other shapes; compiling them would take longer than they do.
            with torch.compiler.set_stance("force_eager"):
                meter.write(step=step, seconds=round(seconds, 1), **on_save(step, ema))

    with Interruption() as interruption, meter.bar:
        while True:
            seconds, stop = time.monotonic() - began, interruption.asked
            if processes > 1:
                seconds, stop = broadcast(seconds, stop, learnt[0].device)
            done = step if steps else seconds
            meter.advance(done)
            if done >= length or stop:
                break
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate_factor(done / length, step)
                optimizer.zero_grad(set_to_none=True)
            if before_step:
                before_step(step)
            number = (seed * 1_000_003 + step) * processes + rank
            loss = loss_of(torch.Generator().manual_seed(number))
            loss.backward()
            loss = loss.detach()
            if processes > 1:
                average([loss, *(p.grad for p in learnt if p.grad is not None)], processes)
            nn.utils.clip_grad_norm_(learnt, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            decay = min(ema_decay, step / (step + 10))
            now = [v.detach() for v in net.state_dict().values()]
            torch._foreach_lerp_(list(ema.values()), now, 1 - decay)
            seconds = time.monotonic() - began
            meter.add(step, seconds, loss)
            if is_rank_zero() and seconds - saved > 60 * save_minutes:
                saved = seconds
                keep(seconds, shown=True)
        if is_rank_zero():
            keep(seconds, shown=not stop)
    if processes > 1:
        dist.barrier()                                       # none leaves before all have arrived
    if stop:
        raise KeyboardInterrupt
    return ema


def write_sheet(folder: Path, step: int, images: list, captions: list[str]) -> dict:
    """Write a stage's sample sheet; returns its entry in the log."""
    sheet = contact_sheet([np.asarray(image) for image in images], captions)
    save(sheet, folder / "sheet.png", {"step": step})
    return {"sheet": str(folder / "sheet.png")}
