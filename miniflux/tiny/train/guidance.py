"""Stage 3: guidance is distilled into the base model, which makes it a FLUX "dev".

    loss = ‖v(x_t, t, caption, w) - (v_∅ + w (v_caption - v_∅))‖²              w uniform in [1, 8]

The base model's guidance embedding learns to do what classifier-free guidance does with two passes
(Meng et al. 2022, arXiv:2210.03142). v_∅ is the base model's velocity for the empty caption. The
text encoders stay as they are.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...generate import generate
from ...sampling import classifier_free, distillation_loss
from .base import PROMPTS, JointModel, Parts, RenewedScenes, bundle, compile_blocks
from .data import BATCH
from .loop import train, write_sheet
from .precision import training_mode
from .velocity import draw_guidance, noise_and_times, velocity

LEARNING_RATE = 1e-3


def run(folder: Path, parts: Parts, device: torch.device, scenes: int, teacher: dict[str, Tensor],
        *, steps: int | None, minutes: float | None, compiled: bool = False) -> None:
    """Distil guidance into a copy of the base model, whose weights are `teacher`."""
    torch.manual_seed(0)
    student, base = JointModel().to(device), JointModel().to(device).requires_grad_(False)
    for model in (student, base):
        model.load_state_dict(teacher)
        if compiled:
            compile_blocks(model.mmdit)
    student.clip.requires_grad_(False)
    student.t5.requires_grad_(False)
    data = RenewedScenes(bundle(base, parts, folder.name), scenes, seed=11)

    def loss(generator: torch.Generator) -> Tensor:
        z, *ids = data.draw(generator, device)
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        empty = data.captions.empty(BATCH, ids[0].shape[1])
        with training_mode(device):
            with torch.no_grad():
                text = base.encode(*ids)
                no_text = base.encode(*(tokens.to(device) for tokens in empty))
            guided = classifier_free(velocity(base.mmdit, *text, 1.0),
                                     velocity(base.mmdit, *no_text, 1.0), w)
            return distillation_loss(velocity(student.mmdit, *text, w), guided, z, eps, t)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = JointModel().to(device)
        averaged.load_state_dict(ema)
        images = generate(bundle(averaged, parts, folder.name), PROMPTS, steps=20, guidance=3.5,
                          progress=False)
        return write_sheet(folder, step, images, PROMPTS)

    train(student, loss, folder, lr=LEARNING_RATE, batch=BATCH, steps=steps, minutes=minutes,
          seed=2, before_step=data.renew, on_save=on_save)
