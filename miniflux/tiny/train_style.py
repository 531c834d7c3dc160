"""Stage 8: a style as a LoRA: whatever the caption says, in neon light.

    loss = ‖v(x_t, t, caption, w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

z are the tokens of a picture that `neon` has redrawn; the caption does not say so, so the LoRA does it always, as much as its scale
says. The last two terms are what guidance w changes in the base model, as for the variants. The file and
what is in it have diffusers' names.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.names import count, mmdit_modules, mmdit_to_diffusers
from ..flux import Flux
from ..generate import generate
from ..latents import encode
from ..networks.attention import attention_backend
from ..networks.mmdit import MMDiTInputs
from ..sampling import image_ids, patchify, text_ids
from .scenes import Scene
from .train_autoencoder import to_tensor
from .train_flow import BATCH, PROMPTS, SIDE, noisy
from .train_variant import LowRank, encode_variant, guidance_change, train_lora, with_factors

RANK = 8


def neon(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the same shape: its edges as tubes of its colours that glow in the dark."""
    bright = np.float32(picture) / np.maximum(picture.max(-1, keepdims=True), 1)
    edges = np.abs(picture - np.float32(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2)))).max(-1, keepdims=True)
    tubes = bright**1.5 * (8 * edges).clip(0, 255)                              # (H, W, 3)
    glow = Image.fromarray(tubes.astype(np.uint8)).filter(ImageFilter.GaussianBlur(5))
    return (6 + tubes + 1.2 * np.float32(glow)).clip(0, 255).astype(np.uint8)


def neon_inputs(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    return patchify(encode(flux, to_tensor(np.stack([neon(picture) for picture in pictures]))))


def run(folder: Path, base: Flux, student: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train a LoRA for `student`, another copy of the model `base`, which is changed; writes it into the folder."""
    torch.manual_seed(0)
    _, *columns, _ = encode_variant(base, neon_inputs, scenes, seed=60)          # tokens in neon light, encoded captions
    mmdit, changes = student.mmdit, with_factors(student.mmdit, RANK)
    device = mmdit.img_in.weight.device
    ids = image_ids(SIDE, SIDE, device=device), text_ids(columns[1].shape[1], device=device)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(columns[0]), (BATCH,), generator=generator)
        tokens, *prompt = (part[index].to(device, torch.float32) for part in columns)
        x, t, target = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            guidance = guidance_change(base.mmdit, x, *prompt, t, w, *ids)
            v = mmdit(MMDiTInputs(x, *prompt, t, w, *ids))
        return (v.float() - target - guidance.float()).square().mean()

    def show() -> tuple[list, list[str]]:
        return generate(student, PROMPTS, steps=16, progress=False), PROMPTS

    train_lora(folder, mmdit, changes, loss, show, steps=steps, minutes=minutes, lr=lr, seed=7,
               file="pytorch_lora_weights.safetensors", write=write_lora)


def write_lora(path: Path, changes: dict[str, LowRank], weights: dict[str, Tensor]) -> None:
    """The learnt factors under the names of diffusers, in bfloat16: where a layer is three there, each has the same A."""
    down, up = ({f"{name}.weight": weights[f"{name}.parametrizations.weight.0.{kind}"].bfloat16() for name in changes} for kind in "AB")
    parts, factors = mmdit_modules(count(set(up), "double_blocks"), count(set(up), "single_blocks")), {}
    names = {part: original for original, those in parts.items() for part in those}
    for name, factor in mmdit_to_diffusers(up).items():
        part = name.removesuffix(".weight")
        factors[f"transformer.{part}.lora_A.weight"] = down[f"{names[part]}.weight"].clone()
        factors[f"transformer.{part}.lora_B.weight"] = factor.contiguous()
    partial = path.with_suffix(".part")
    save_file(factors, partial)
    partial.replace(path)
