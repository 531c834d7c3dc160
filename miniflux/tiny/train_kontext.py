"""Stage 6: to change a picture by an instruction, as a LoRA: what FLUX.1 Kontext is (arXiv:2506.15742).

    loss = ‖v(x_t ⊕ r, t, instruction, w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

z are the tokens of the picture after the edit, r those of the picture before it: they follow in the sequence, with index 1 as their
first position, and what the network says of them is dropped. The last two terms are what guidance w changes in the base model, of a
caption that describes the result; the variant sees the instruction alone.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..flux import Flux
from ..kontext_edit import kontext_edit
from ..latents import encode
from ..networks.attention import attention_backend
from ..prompt import encode_prompt
from ..sampling import image_ids, patchify, text_ids
from .edits import describe, sample_edit
from .scenes import Scene, render
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, guidance_change, side_by_side, train_lora, with_factors


@torch.no_grad()
def encode_edits(flux: Flux, count: int, seed: int) -> tuple[list[Tensor], list[tuple[Scene, str, Scene]]]:
    """`count` edits: tokens after and before, encoded instructions and captions of the results, all in bfloat16; the first edits."""
    rng, columns, kept = random.Random(seed), [], []
    flux.autoencoder.to(memory_format=torch.channels_last)
    for begin in range(0, count, 64):
        edits = [sample_edit(rng) for _ in range(min(64, count - begin))]
        asked, said = (encode_prompt(flux, texts) for texts in ([instruction for _, instruction, _ in edits],
                                                                [describe(after) for _, _, after in edits]))
        with torch.autocast(asked.txt.device.type, torch.bfloat16):
            z, r = (patchify(encode(flux, to_tensor(np.stack([render(edit[i]) for edit in edits])))) for i in (2, 0))
        columns.append([part.bfloat16().cpu() for part in (z, r, asked.txt, asked.vec, said.txt, said.vec)])
        kept += edits[:64 - len(kept)]
    return list(map(torch.cat, zip(*columns))), kept


def run(folder: Path, base: Flux, student: Flux, steps: int | None, minutes: float | None, count: int, lr: float) -> None:
    """Train a LoRA for `student`, another copy of the model `base`, which is changed; writes it into the folder."""
    torch.manual_seed(0)
    (z, r, *prompts), shown = encode_edits(base, count, seed=40)
    mmdit, changes = student.mmdit, with_factors(student.mmdit, 0)
    device = mmdit.img_in.weight.device
    ids, text = image_ids(SIDE, SIDE, device=device), text_ids(prompts[0].shape[1], device=device)
    both = torch.cat([ids, image_ids(SIDE, SIDE, index=1, device=device)])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(z), (BATCH,), generator=generator)
        tokens, before, *asked, said_txt, said_vec = (part[index].to(device, torch.float32) for part in (z, r, *prompts))
        x, t, target = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            guidance = guidance_change(base.mmdit, x, said_txt, said_vec, t, w, ids, text)
            v = mmdit(torch.cat([x, before], dim=1), *asked, t, w, both, text)[:, :x.shape[1]]
        return (v.float() - target - guidance.float()).square().mean()

    def show() -> tuple[list, list[str]]:
        instructions, before = [edit[1] for edit in shown[:SHOWN]], [render(edit[0]) for edit in shown[:SHOWN]]
        return side_by_side(before, kontext_edit(student, instructions, before, steps=16, progress=False), instructions)

    train_lora(folder, student, changes, loss, show, steps=steps, minutes=minutes, lr=lr, seed=5)
