"""Stage 6: to change a picture by an instruction, as a LoRA: what FLUX.1 Kontext is (arXiv:2506.15742).

    loss = ‖v(x_t ⊕ r, t, instruction, w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

z are the tokens of the picture after the edit, r those of the picture before it: they follow in the sequence, with index 1 as their
first position, and what the network says of them is dropped. The last two terms are what guidance w changes in the base model, of a
caption that describes the result; the variant sees the instruction alone.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..flux import Flux
from ..images import save
from ..kontext_edit import kontext_edit
from ..latents import encode
from ..networks.attention import attention_backend
from ..prompt import encode_prompt
from ..sampling import image_ids, patchify, text_ids
from .edits import describe, sample_edit
from .scenes import Scene, contact_sheet, render
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, with_factors, write_lora
from .training import train


@torch.no_grad()
def encode_edits(flux: Flux, count: int, seed: int) -> tuple[list[Tensor], list[tuple[Scene, str, Scene]]]:
    """`count` edits: tokens after and before, encoded instructions and captions of the results, all in bfloat16; the first edits."""
    rng, columns, kept = random.Random(seed), [], []
    flux.autoencoder.to(memory_format=torch.channels_last)
    for begin in range(0, count, 64):
        edits = [sample_edit(rng) for _ in range(min(64, count - begin))]
        asked, said = (encode_prompt(flux, texts) for texts in ([instruction for _, instruction, _ in edits],
                                                                [describe(after) for _, _, after in edits]))
        with torch.autocast("cpu", torch.bfloat16):
            z, r = (patchify(encode(flux, to_tensor(np.stack([render(edit[i]) for edit in edits])))) for i in (2, 0))
        columns.append([part.bfloat16() for part in (z, r, asked.txt, asked.vec, said.txt, said.vec)])
        kept += edits[:64 - len(kept)]
    return list(map(torch.cat, zip(*columns))), kept


def run(folder: Path, base: Flux, student: Flux, steps: int | None, minutes: float | None, count: int, lr: float) -> None:
    """Train a LoRA for `student`, another copy of the model `base`, which is changed; writes it into the folder."""
    torch.manual_seed(0)
    (z, r, *prompts), shown = encode_edits(base, count, seed=40)
    mmdit, changes = student.mmdit, with_factors(student.mmdit, 0)
    ids, text = image_ids(SIDE, SIDE), text_ids(prompts[0].shape[1])
    both = torch.cat([ids, image_ids(SIDE, SIDE, index=1)])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(z), (BATCH,), generator=generator)
        x, t, target = noisy(z[index], generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator)
        txt, vec, said_txt, said_vec = (part[index].float() for part in prompts)
        with torch.autocast("cpu", torch.bfloat16), attention_backend("formula"):
            with torch.no_grad():
                said = said_txt, said_vec, t
                guidance = base.mmdit(x, *said, w, ids, text) - base.mmdit(x, *said, torch.ones_like(w), ids, text)
            v = mmdit(torch.cat([x, r[index].float()], dim=1), txt, vec, t, w, both, text)[:, :x.shape[1]]
        return (v.float() - target - guidance.float()).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        now = {name: value.clone() for name, value in mmdit.state_dict().items()}
        mmdit.load_state_dict(ema)
        edits = shown[:SHOWN]
        before = [render(scene) for scene, _, _ in edits]
        after = kontext_edit(student, [instruction for _, instruction, _ in edits], before, steps=16, progress=False)
        mmdit.load_state_dict(now)
        pairs = [np.asarray(picture) for pair in zip(before, after) for picture in pair]
        save(contact_sheet(pairs, [text for _, instruction, _ in edits for text in ("", instruction)]), folder / "sheet.png", {"step": step})
        write_lora(folder / "lora.safetensors", changes, ema)
        return {"sheet": str(folder / "sheet.png")}

    student = replace(student, config=replace(student.config, name="kontext"))
    train(mmdit, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=5, on_save=on_save)
