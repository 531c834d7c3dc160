"""Stage 6: to change a picture by an instruction, as a LoRA: what FLUX.1 Kontext is (arXiv:2506.15742).

    loss = Σ_i a_i ‖v(x_t ⊕ r, t, instruction, w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²_i

z are the tokens of the picture after the edit, r those of the picture before it: they follow in the sequence, with index 1 as their
first position, and what the network says of them is dropped. The last two terms are what guidance w changes in the base model, of a
caption that describes the result; the variant sees the instruction alone. The text encoders, which know captions only, learn along: the
LoRA changes them too.

a_i, 1 on average, is four times as large where the edit changes something: most edits leave most of the picture as it is, and to copy is
soon learnt.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux import Flux
from ..kontext_edit import kontext_edit
from ..latents import encode
from ..networks.attention import attention_backend
from ..networks.mmdit import MMDiTInputs
from ..prompt import encode_prompt
from ..sampling import image_ids, patchify, text_ids
from .edits import describe, sample_edit
from .scenes import Scene, render
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, guidance_change, side_by_side, train_lora, with_factors
from .vocabulary import MAX_TOKENS

STRESS = 4.0                        # how much more it counts what an edit changes than what it leaves


def stress(before: np.ndarray, after: np.ndarray) -> Tensor:
    """What each token counts, 1 on average, for pictures (n, 128, 128, 3): (n, N, 1)."""
    changed = torch.from_numpy((before != after).any(-1)).float()               # (n, 128, 128)
    count = 1 + (STRESS - 1) * F.max_pool2d(changed, 16).flatten(1)  # (n, N)
    return (count / count.mean(1, keepdim=True))[..., None]


@torch.no_grad()
def encode_edits(flux: Flux, count: int, seed: int) -> tuple[list[Tensor], list[tuple[Scene, str, Scene]]]:
    """`count` edits: tokens after and before, what each token counts, encoded captions of the results, all in bfloat16, and the
    instructions' ids for CLIP and T5; the first edits."""
    rng, columns, kept = random.Random(seed), [], []
    flux.autoencoder.to(memory_format=torch.channels_last)
    for begin in range(0, count, 64):
        edits = [sample_edit(rng) for _ in range(min(64, count - begin))]
        before, after = (np.stack([render(edit[i]) for edit in edits]) for i in (0, 2))
        said = encode_prompt(flux, [describe(edit[2]) for edit in edits])
        with torch.autocast(said.txt.device.type, torch.bfloat16):
            z, r = (patchify(encode(flux, to_tensor(pictures))) for pictures in (after, before))
        asked = [tokenizer([edit[1] for edit in edits], MAX_TOKENS) for tokenizer in (flux.clip_tokenizer, flux.t5_tokenizer)]
        columns.append([part.bfloat16().cpu() for part in (z, r, stress(before, after), said.txt, said.pooled)] + asked)
        kept += edits[:64 - len(kept)]
    return list(map(torch.cat, zip(*columns))), kept


def run(folder: Path, base: Flux, student: Flux, steps: int | None, minutes: float | None, count: int, lr: float) -> None:
    """Train a LoRA for `student`, another copy of the model `base`, which is changed; writes it into the folder."""
    torch.manual_seed(0)
    (z, r, counts, *said, clip_ids, t5_ids), shown = encode_edits(base, count, seed=40)
    mmdit, clip, t5 = student.mmdit, student.clip, student.t5
    net = nn.ModuleDict(dict(mmdit.named_children()) | {"text_encoder": clip, "text_encoder_2": t5})     # named as LoRA files name them
    changes, device = with_factors(net), mmdit.img_in.weight.device
    ids, text = image_ids(SIDE, SIDE, device=device), text_ids(MAX_TOKENS, device=device)
    both = torch.cat([ids, image_ids(SIDE, SIDE, index=1, device=device)])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(z), (BATCH,), generator=generator)
        tokens, before, weight, *caption = (part[index].to(device, torch.float32) for part in (z, r, counts, *said))
        x, t, target = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            guidance = guidance_change(base.mmdit, x, *caption, t, w, ids, text)
            instruction = t5(t5_ids[index].to(device)), clip(clip_ids[index].to(device))
            v = mmdit(MMDiTInputs(torch.cat([x, before], dim=1), *instruction, t, w, both, text))[:, :x.shape[1]]
        return (weight * (v.float() - target - guidance.float()).square()).mean()

    def show() -> tuple[list, list[str]]:
        instructions, before = [edit[1] for edit in shown[:SHOWN]], [render(edit[0]) for edit in shown[:SHOWN]]
        return side_by_side(before, kontext_edit(student, instructions, before, steps=16, progress=False), instructions)

    train_lora(folder, net, changes, loss, show, steps=steps, minutes=minutes, lr=lr, seed=5)
