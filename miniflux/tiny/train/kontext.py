"""Stage 6: to change an image by an instruction, as a LoRA: FLUX.1 Kontext (arXiv:2506.15742).

    loss = Σ_i a_i ‖v(x_t ⊕ r, t, instruction, w) - (ε - z) - (v_base(w) - v_base(1))‖²_i

z are the latents of the image after the edit, r the tokens of the image before it: they follow in
the sequence, with index 1 as their first position, and their own outputs are dropped. The last two
terms are what guidance w changes in the base model, for a caption that describes the result; the
variant sees the instruction alone. The text encoders, which were trained on captions only, learn
along: the LoRA changes them too.

a_i, 1 on average, is four times as large where the edit changes something: most edits leave most of
the image as it is, and to copy is soon learnt.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.lora_layers import insert_loras
from ...flux import Flux
from ...kontext_edit import kontext_edit
from ...prompt import encode_prompt
from ...sampling import Conditions, flow_matching_loss, image_ids, patchify
from ..world.edits import describe, sample_edit
from ..world.rendering import render
from ..world.scenes import Scene
from ..world.vocabulary import MAX_TOKENS
from .data import BATCH, CHUNK, draw, encode_images, to_columns
from .lora import RANK, SHOWN, side_by_side, train_lora
from .precision import training_mode
from .velocity import LATENT_SIZE, draw_guidance, noise_and_times, velocity, without_guidance

EDIT_WEIGHT = 4.0                        # of a place that an edit changes, where another counts 1
LEARNING_RATE = 2e-3


def edit_weights(before: np.ndarray, after: np.ndarray) -> Tensor:
    """The weight of each latent pixel, 1 on average, for images (n, 128, 128, 3): (n, 1, 16, 16).

    All four latent pixels of a token have one weight."""
    changed = torch.from_numpy((before != after).any(-1))[:, None].float()      # (n, 1, 128, 128)
    tokens = 1 + (EDIT_WEIGHT - 1) * F.max_pool2d(changed, 16)                  # (n, 1, 8, 8)
    weights = tokens / tokens.mean((1, 2, 3), keepdim=True)
    return weights.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@torch.no_grad()
def encode_edits(flux: Flux, count: int, seed: int) -> tuple[list[Tensor], list]:
    """`count` edits as columns: latents after, tokens before, weights, encoded captions of the
    results (txt and pooled), the instructions' ids for CLIP and T5; and the first edits."""
    rng = random.Random(seed)
    rows: list[list[Tensor]] = []
    first: list[tuple[Scene, str, Scene]] = []
    for begin in range(0, count, CHUNK):
        edits = [sample_edit(rng) for _ in range(min(CHUNK, count - begin))]
        before, after = (np.stack([render(edit[i]) for edit in edits]) for i in (0, 2))
        caption = encode_prompt(flux, [describe(edit[2]) for edit in edits])
        instructions = [edit[1] for edit in edits]
        rows.append([
            encode_images(flux, after), patchify(encode_images(flux, before)),
            edit_weights(before, after), caption.txt, caption.pooled,
            flux.clip_tokenizer(instructions, MAX_TOKENS),
            flux.t5_tokenizer(instructions, MAX_TOKENS)])
        first = first or edits
    return to_columns(rows), first


def run(folder: Path, base: Flux, student: Flux, count: int, *, steps: int | None,
        minutes: float | None) -> None:
    """Train a LoRA for `student`, another copy of the model `base`, which is changed; writes it
    into the folder."""
    torch.manual_seed(0)
    columns, first = encode_edits(base, count, seed=40)
    mmdit, clip, t5 = student.mmdit, student.clip, student.t5
    encoders = {"text_encoder": clip, "text_encoder_2": t5}             # as LoRA files name them
    loras = list(insert_loras(mmdit, RANK))
    for part, encoder in encoders.items():
        loras += [f"{part}.{name}" for name in insert_loras(encoder, RANK)]
    net = nn.ModuleDict(dict(mmdit.named_children()) | encoders)
    device = mmdit.img_in.weight.device
    before_ids = image_ids(LATENT_SIZE, LATENT_SIZE, index=1, device=device)

    def loss(generator: torch.Generator) -> Tensor:
        z, before, weight, *rest = draw(columns, BATCH, generator, device)
        txt, pooled, clip_ids, t5_ids = rest
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        with training_mode(device):
            cond = Conditions(img_cond_seq=before, img_cond_seq_ids=before_ids)
            v = velocity(mmdit, t5(t5_ids), clip(clip_ids), w, cond)
            v = without_guidance(v, base.mmdit, txt, pooled, w)
            return flow_matching_loss(v, z, eps, t, weight)

    def show() -> tuple[list, list[str]]:
        before = [render(edit[0]) for edit in first[:SHOWN]]
        instructions = [edit[1] for edit in first[:SHOWN]]
        painted = kontext_edit(student, instructions, before, steps=16, progress=False)
        return side_by_side(before, painted, instructions)

    train_lora(folder, net, loras, loss, show, steps=steps, minutes=minutes, lr=LEARNING_RATE,
               seed=5)
