"""Stage 5: four steps instead of 28, without guidance: what "schnell" is.

    teacher:   twelve Euler steps from noise with guidance 3.5; its states at
               t = 1, 3/4, 1/2, 1/4, 0 are kept: x_0 .. x_4
    student:   loss = ‖v(x_k, t_k, caption) - (x_{k+1} - x_k) / (t_{k+1} - t_k)‖²,   k in 0..3

The student learns to take three of the teacher's steps in one, on the teacher's own paths:
progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) in one leap. Its change is a LoRA.
It always sees guidance 3.5, so `load` folds that into the network (`variant.json` names it), and
what is left takes no guidance, as FLUX.1-schnell.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.lora_layers import insert_loras
from ...flux import SCHEDULES, Flux
from ...generate import generate
from ...prompt import encode_prompt
from ...sampling import euler
from ..world.scenes import sample_scene
from .base import PROMPTS
from .data import BATCH, take, to_columns
from .lora import RANK, train_lora
from .precision import training_mode
from .velocity import LATENT_SIZE, velocity

STEPS, TEACHER_STEPS, GUIDANCE = 4, 12, 3.5
LEARNING_RATE = 1e-3


@torch.no_grad()
def paths(teacher: Flux, count: int, seed: int) -> list[Tensor]:
    """The teacher's states (count, STEPS + 1, 16, 16, 16) on its way to `count` images, and their
    encoded captions."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    times = torch.linspace(1, 0, TEACHER_STEPS + 1).tolist()
    rows = []
    for begin in range(0, count, BATCH):
        n = min(BATCH, count - begin)
        prompt = encode_prompt(teacher, [sample_scene(rng).caption for _ in range(n)])
        eps = torch.randn(n, 16, LATENT_SIZE, LATENT_SIZE, generator=generator)
        eps = eps.to(prompt.txt.device)
        states = []

        def keep(step: int, t: float, x: Tensor, states: list = states) -> None:
            if step % (TEACHER_STEPS // STEPS) == 0:
                states.append(x)

        with training_mode(eps.device):
            v = velocity(teacher.mmdit, prompt.txt, prompt.pooled, GUIDANCE)
            states.append(euler(v, eps, times, on_step=keep))
        rows.append([torch.stack(states, dim=1), prompt.txt, prompt.pooled])
    return to_columns(rows)


def run(folder: Path, teacher: Flux, student: Flux, count: int, *, steps: int | None,
        minutes: float | None) -> None:
    """Distil the teacher's paths to `count` images into `student`, another copy of it, which is
    changed. Writes its LoRA into the folder."""
    torch.manual_seed(0)
    states, *text = paths(teacher, count, seed=30)
    config = replace(student.config, schedule=SCHEDULES["schnell"])     # its times are quarters
    student = replace(student, config=config)
    mmdit = student.mmdit
    loras = insert_loras(mmdit, RANK)
    device = mmdit.img_in.weight.device
    times = torch.linspace(1, 0, STEPS + 1)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(states), (BATCH,), generator=generator)
        k = torch.randint(STEPS, (BATCH,), generator=generator)
        now, then = (states[index, at].to(device).float() for at in (k, k + 1))
        with training_mode(device):
            v = velocity(mmdit, *take(text, index, device), GUIDANCE)
            slope = (now - then) * STEPS                                        # (B, 16, h, w)
            return (v(now, times[k].to(device)).float() - slope).square().mean()

    def show() -> tuple[list, list[str]]:
        images = generate(student, PROMPTS, steps=STEPS, guidance=GUIDANCE, progress=False)
        return images, PROMPTS

    train_lora(folder, mmdit, loras, loss, show, steps=steps, minutes=minutes, lr=LEARNING_RATE,
               seed=4)
