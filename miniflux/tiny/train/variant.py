"""Stage 4: variants of the base model: to fill holes, to follow edges or depths.

    loss = ‖v(x_t ⊕ c, t, caption, w) - (ε - z) - (v_base(w) - v_base(1))‖²

c are further channels of each image token. The variant is a LoRA with a wider first layer, the form
in which Black Forest Labs published their Canny and Depth LoRAs. The last two terms are what
guidance w changes in the base model (`velocity.without_guidance`).
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.lora_layers import insert_loras
from ...control import control
from ...fill import fill, fill_channels
from ...flux import Flux
from ...networks.mmdit import MMDiT
from ...sampling import Conditions, flow_matching_loss, patchify
from ..world.pairs import depth_map, edges, hole
from ..world.rendering import render
from ..world.scenes import Scene
from .data import BATCH, draw, encode_images, encode_scenes, normalize
from .lora import RANK, SHOWN, side_by_side, train_lora
from .precision import training_mode
from .velocity import draw_guidance, noise_and_times, velocity, without_guidance

LEARNING_RATE = 2e-3
FILL_GUIDANCE = 30 / 3.5                 # fill's guidance is 30 where the base model's is 3.5


def fill_inputs(flux: Flux, scenes: list[Scene], images: np.ndarray, rng: random.Random) -> Tensor:
    holes = torch.from_numpy(np.stack([hole(scene, rng) for scene in scenes]))[:, None].float()
    with training_mode(flux.mmdit.img_in.weight.device):
        return fill_channels(flux, normalize(images), holes)                    # (n, N, 320)


def edge_inputs(flux: Flux, scenes: list[Scene], images: np.ndarray, rng: random.Random) -> Tensor:
    return patchify(encode_images(flux, [edges(image) for image in images]))


def depth_inputs(flux: Flux, scenes: list[Scene], images: np.ndarray, rng: random.Random) -> Tensor:
    return patchify(encode_images(flux, [depth_map(scene) for scene in scenes]))


# Variant -> (its further channels, its guidance in units of the base model's).
VARIANTS: dict[str, tuple[Callable, float]] = {
    "fill": (fill_inputs, FILL_GUIDANCE), "canny": (edge_inputs, 1.0), "depth": (depth_inputs, 1.0)}


def widen(mmdit: MMDiT, further: int) -> None:
    """Give the network's first layer further input channels, which it does not use yet."""
    mmdit.img_in.weight = nn.Parameter(F.pad(mmdit.img_in.weight, (0, further)))
    mmdit.img_in.in_features += further
    mmdit.config = replace(mmdit.config, in_channels=mmdit.config.in_channels + further)


def run(folder: Path, variant: str, base: Flux, student: Flux, scenes: int, *, steps: int | None,
        minutes: float | None) -> None:
    """Train a variant of the model `base`; `student`, another copy of it, is changed. Writes its
    LoRA into the folder."""
    torch.manual_seed(0)
    inputs, unit = VARIANTS[variant]
    columns, first = encode_scenes(base, scenes, seed=20, extra=inputs)
    mmdit = student.mmdit
    widen(mmdit, columns[1].shape[-1])
    loras = insert_loras(mmdit, RANK)
    device = mmdit.img_in.weight.device

    def loss(generator: torch.Generator) -> Tensor:
        z, img_cond, *text = draw(columns, BATCH, generator, device)
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        with training_mode(device):
            v = velocity(mmdit, *text, unit * w, Conditions(img_cond=img_cond))
            return flow_matching_loss(without_guidance(v, base.mmdit, *text, w), z, eps, t)

    def show() -> tuple[list, list[str]]:
        return sheet(variant, student, first[:SHOWN])

    train_lora(folder, mmdit, loras, loss, show, steps=steps, minutes=minutes, lr=LEARNING_RATE,
               seed=3)


def sheet(variant: str, flux: Flux, scenes: list[Scene]) -> tuple[list, list[str]]:
    """What the variant makes of the scenes, each beside what it was given."""
    images = [render(scene) for scene in scenes]
    captions = [scene.caption for scene in scenes]
    keywords = dict(steps=16, progress=False)
    if variant == "fill":
        rng = random.Random(1)
        holes = [np.uint8(255) * hole(scene, rng) for scene in scenes]
        painted = fill(flux, captions, images, holes, **keywords)
        given = [np.where(mask[..., None] > 0, 128, image).astype(np.uint8)
                 for mask, image in zip(holes, images)]
    else:
        given = [edges(image) if variant == "canny" else depth_map(scene)
                 for scene, image in zip(scenes, images)]
        painted = control(flux, captions, given, **keywords)
    return side_by_side(given, painted, captions)
