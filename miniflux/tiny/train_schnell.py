"""Stage 5: four steps instead of 28, without guidance: what "schnell" is.

    teacher:   twelve Euler steps from noise with guidance 3.5; its states at t = 1, 3/4, 1/2, 1/4, 0 are kept: x_0 .. x_4
    student:   loss = ‖v(x_k, t_k, caption) - (x_{k+1} - x_k) / (t_{k+1} - t_k)‖²         k uniform in 0 .. 3

The student learns to take three of the teacher's steps in one, on the teacher's own paths: progressive distillation (Salimans & Ho
2022, arXiv:2202.00512) in one leap. Its change is a LoRA. It always sees guidance 3.5, so `load` folds that into the network
(`variant.json` says which), and what is left takes no guidance, as FLUX.1-schnell.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..flux import SCHEDULES, Flux
from ..generate import generate
from ..networks.attention import attention_backend
from ..networks.mmdit import MMDiTInputs
from ..prompt import encode_prompt
from ..sampling import image_ids, text_ids
from .scenes import sample_scene
from .train_flow import BATCH, PROMPTS, SIDE
from .train_variant import train_lora, with_factors

STEPS, TEACHER_STEPS, GUIDANCE = 4, 12, 3.5


@torch.no_grad()
def paths(teacher: Flux, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's states (count, STEPS + 1, N, 64) on its way to `count` pictures, and their encoded captions."""
    rng, generator, columns = random.Random(seed), torch.Generator().manual_seed(seed), []
    times = torch.linspace(1, 0, TEACHER_STEPS + 1)
    for begin in range(0, count, BATCH):
        n = min(BATCH, count - begin)
        prompt = encode_prompt(teacher, [sample_scene(rng).caption for _ in range(n)])
        device = prompt.txt.device
        ids = image_ids(SIDE, SIDE, device=device), text_ids(prompt.txt.shape[1], device=device)
        x = torch.randn(n, SIDE ** 2 // 4, 64, generator=generator).to(device)
        states, guidance = [x], torch.full((n,), GUIDANCE, device=device)
        for i, (now, then) in enumerate(zip(times, times[1:]), start=1):
            with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
                v = teacher.mmdit(MMDiTInputs(x, prompt.txt, prompt.pooled, now.expand(n).to(device), guidance, *ids))
            x = x + (then - now) * v.float()                                    # (n, N, 64)
            states += [x] if i % (TEACHER_STEPS // STEPS) == 0 else []
        columns.append((torch.stack(states, dim=1).cpu(), prompt.txt.bfloat16().cpu(), prompt.pooled.bfloat16().cpu()))
    return tuple(map(torch.cat, zip(*columns)))


def run(folder: Path, teacher: Flux, student: Flux, steps: int | None, minutes: float | None, count: int, lr: float) -> None:
    """Distil the teacher's paths to `count` pictures into `student`, another copy of it, which is changed; writes its LoRA."""
    torch.manual_seed(0)
    states, txt, vec = paths(teacher, count, seed=30)
    student = replace(student, config=replace(student.config, schedule=SCHEDULES["schnell"], few_steps=True))      # its times are quarters
    mmdit, changes = student.mmdit, with_factors(student.mmdit)
    device, times = mmdit.img_in.weight.device, torch.linspace(1, 0, STEPS + 1)
    ids = image_ids(SIDE, SIDE, device=device), text_ids(txt.shape[1], device=device)
    guidance = torch.full((BATCH,), GUIDANCE, device=device)

    def loss(generator: torch.Generator) -> Tensor:
        index, k = (torch.randint(high, (BATCH,), generator=generator) for high in (len(states), STEPS))
        x, then, *c, t = (part.to(device, torch.float32) for part in (states[index, k], states[index, k + 1], txt[index], vec[index], times[k]))
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            v = mmdit(MMDiTInputs(x, *c, t, guidance, *ids))
        return (v.float() - (x - then) * STEPS).square().mean()

    def show() -> tuple[list, list[str]]:
        return generate(student, PROMPTS, steps=STEPS, guidance=GUIDANCE, progress=False), PROMPTS

    train_lora(folder, mmdit, changes, loss, show, steps=steps, minutes=minutes, lr=lr, seed=4)
