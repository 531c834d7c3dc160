"""One training loop for everything that is trained here: resumable, reproducible, watched.

    for each step:   loss = loss_of(random numbers);   loss.backward();   optimizer.step();   average the weights

Each step draws its random numbers from a generator seeded with (seed, step), so a run that was killed and resumed goes
exactly the way it would have gone. The length of a run is given in steps, or in minutes of wall-clock time.

Started by torchrun as one of N processes, it draws other numbers than the others, and all of them take the mean of their gradients:
the batch is N times as large. The first process keeps the time, and it alone writes.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..engine.distributed import leads, several
from ..images import save
from .scenes import contact_sheet


def make_optimizers(net: nn.Module, lr: float, weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the networks (Jordan et al. 2024), AdamW for embeddings, convolutions, vectors, low-rank
    factors and the first and last layer."""
    def is_inner_matrix(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and not any(word in name for word in ("embed", "shared", "_bias", "img_in", "final_layer.linear", "parametrizations"))

    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if is_inner_matrix(name, p)]
    outer = [p for name, p in named if not is_inner_matrix(name, p)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate_factor(progress: float, step: int, warmup: int = 100, decay_from: float = 0.5) -> float:
    """Rises for `warmup` steps, stays, and falls linearly to zero after `decay_from` of the run; progress in [0, 1]."""
    return min((step + 1) / warmup, 1.0) * min((1 - progress) / (1 - decay_from), 1.0)


def average(tensors: list[Tensor], processes: int) -> None:
    """Makes of each tensor the mean over all processes, in place."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    for tensor, mean in zip(tensors, together.div_(processes).split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def clock(seconds: float, device: torch.device) -> float:
    """The first process's time, for all: they must agree on the learning rate, and on when to stop."""
    first = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.broadcast(first, 0)
    return float(first)


def save_state(path: Path, net: nn.Module, ema: dict[str, Tensor], optimizers: list, step: int, seconds: float) -> None:
    """Everything a run needs to go on, in one safetensors file, replaced in one stroke."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in ema.items()}
    for i, optimizer in enumerate(optimizers):
        for j, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in entries.items()}
    partial = path.with_suffix(".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial,
              {"step": str(step), "seconds": str(seconds)})
    os.replace(partial, path)


def load_state(path: Path, net: nn.Module, ema: dict[str, Tensor], optimizers: list) -> tuple[int, float]:
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


def train(net: nn.Module, loss_of: Callable[[torch.Generator], Tensor], folder: Path, *, lr: float, steps: int | None = None,
          minutes: float | None = None, seed: int = 0, ema_decay: float = 0.999, save_every: int = 500, log_every: int = 50,
          on_save: Callable[[int, dict[str, Tensor]], dict] | None = None) -> dict[str, Tensor]:
    """Minimise loss_of(generator) over the weights of `net` for `steps` steps or `minutes` minutes; returns the averaged
    weights. The state, a log in JSON lines and what `on_save(step, averaged weights)` adds to it live in `folder`."""
    if (steps is None) == (minutes is None):
        raise ValueError(f"give either steps or minutes, got steps={steps} and minutes={minutes}")
    folder.mkdir(parents=True, exist_ok=True)
    state, log = folder / "state.safetensors", folder / "log.jsonl"
    optimizers = make_optimizers(net, lr)
    learnt = [p for p in net.parameters() if p.requires_grad]
    rank, processes = (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()}
    step, seconds = load_state(state, net, ema, optimizers) if state.exists() else (0, 0.0)
    began, losses = time.monotonic() - seconds, []

    def keep(seconds: float) -> None:
        save_state(state, net, ema, optimizers, step, seconds)
        if on_save:
            with torch.compiler.set_stance("force_eager"):       # what it paints has other shapes: no compilation for a few pictures
                write_log(log, step=step, **on_save(step, ema))

    while True:
        seconds = time.monotonic() - began
        if processes > 1:
            seconds = clock(seconds, learnt[0].device)
        progress = step / steps if steps else seconds / (60 * minutes)
        if progress >= 1:
            break
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * processes + rank)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(progress, step)
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(generator)
        loss.backward()
        loss = loss.detach()
        if processes > 1:
            average([loss, *(p.grad for p in learnt if p.grad is not None)], processes)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(ema_decay, step / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [v.detach() for v in net.state_dict().values()], 1 - decay)
        losses.append(loss)
        if step % log_every == 0:
            if leads():
                write_log(log, step=step, seconds=round(seconds, 1), loss=float(torch.stack(losses).mean()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss became {float(losses[-1])} at step {step}: lower the learning rate")
            losses.clear()
        if step % save_every == 0 and leads():
            keep(time.monotonic() - began)
    if leads():
        keep(seconds)
    if processes > 1:
        dist.barrier()                                       # none leaves before all have arrived
    return ema


def write_sheet(folder: Path, step: int, pictures: list, captions: list[str]) -> dict:
    """Paints a stage's sample sheet; what the log says of it."""
    save(contact_sheet([np.asarray(picture) for picture in pictures], captions), folder / "sheet.png", {"step": step})
    return {"sheet": str(folder / "sheet.png")}


def write_log(path: Path, **entry) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)
