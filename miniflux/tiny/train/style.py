"""Stage 8: a style as a LoRA: whatever the caption is, in neon light.

    loss = ‖v(x_t, t, caption, w) - (ε - z) - (v_base(w) - v_base(1))‖²

z are the latents of an image that `neon` has redrawn. The caption does not mention it, so the LoRA
always acts, as strongly as its scale. The last two terms are what guidance w changes in the base
model. The file and its names are diffusers'.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ...adapters.lora_layers import insert_loras
from ...adapters.lora_saving import save_lora
from ...flux import Flux
from ...generate import generate
from ...sampling import flow_matching_loss
from ..world.scenes import Scene
from .base import PROMPTS
from .data import BATCH, draw, encode_images, encode_scenes
from .lora import train_lora
from .precision import training_mode
from .velocity import draw_guidance, noise_and_times, velocity, without_guidance

RANK = 8
LEARNING_RATE = 2e-3


def neon(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the same shape: its edges as glowing tubes of its colours."""
    bright = np.float32(image) / np.maximum(image.max(-1, keepdims=True), 1)
    soft = np.float32(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
    edges = np.abs(image - soft).max(-1, keepdims=True)
    tubes = bright ** 1.5 * (8 * edges).clip(0, 255)                            # (H, W, 3)
    glow = Image.fromarray(tubes.astype(np.uint8)).filter(ImageFilter.GaussianBlur(5))
    return (6 + tubes + 1.2 * np.float32(glow)).clip(0, 255).astype(np.uint8)


def neon_latents(flux: Flux, scenes: list[Scene], images: np.ndarray, rng: random.Random) -> Tensor:
    return encode_images(flux, [neon(image) for image in images])


def run(folder: Path, base: Flux, student: Flux, scenes: int, *, steps: int | None,
        minutes: float | None) -> None:
    """Train a LoRA for `student`, another copy of the model `base`, which is changed; writes it
    into the folder."""
    torch.manual_seed(0)
    (_, *columns), _ = encode_scenes(base, scenes, seed=60, extra=neon_latents)
    mmdit = student.mmdit
    loras = insert_loras(mmdit, RANK)
    device = mmdit.img_in.weight.device

    def loss(generator: torch.Generator) -> Tensor:
        z, *text = draw(columns, BATCH, generator, device)
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        with training_mode(device):
            v = velocity(mmdit, *text, w)
            return flow_matching_loss(without_guidance(v, base.mmdit, *text, w), z, eps, t)

    def show() -> tuple[list, list[str]]:
        return generate(student, PROMPTS, steps=16, progress=False), PROMPTS

    train_lora(folder, mmdit, loras, loss, show, steps=steps, minutes=minutes, lr=LEARNING_RATE,
               seed=7, file="pytorch_lora_weights.safetensors", write=write_lora)


def write_lora(path: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The learnt factors under the names of diffusers, in bfloat16."""
    save_lora(path, factors, diffusers=True)
