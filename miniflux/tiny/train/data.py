"""What the stages learn from: scenes, rendered and encoded once, kept in memory in bfloat16."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...flux import Flux
from ...latents import encode
from ...prompt import encode_prompt
from ..world.rendering import render
from ..world.scenes import Scene, sample_scene
from .precision import training_mode

BATCH = 64                               # samples in a step
CHUNK = 64                               # scenes that are encoded at once, and kept for sheets

# (the model, scenes, their images (n, 128, 128, 3), a random source) -> a tensor (n, ...)
Extra = Callable[[Flux, list[Scene], np.ndarray, random.Random], Tensor]


def normalize(images: Sequence[np.ndarray]) -> Tensor:
    """Images (n, H, W, 3) uint8 -> (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_images(flux: Flux, images: Sequence[np.ndarray]) -> Tensor:
    """Images (n, H, W, 3) uint8 -> latents (n, 16, H/8, W/8), float32."""
    flux.autoencoder.to(memory_format=torch.channels_last)
    with training_mode(next(flux.autoencoder.parameters()).device):
        return encode(flux, normalize(images)).float()


@torch.no_grad()
def encode_scenes(flux: Flux, count: int, seed: int, extra: Extra | None = None
                  ) -> tuple[list[Tensor], list[Scene]]:
    """`count` scenes as columns: latents, what `extra` makes of them, if given, and the encoded
    captions (txt and pooled); and the first scenes, for a sheet."""
    rng = random.Random(seed)
    rows, first = [], []
    for begin in range(0, count, CHUNK):
        scenes = [sample_scene(rng) for _ in range(min(CHUNK, count - begin))]
        images = np.stack([render(scene) for scene in scenes])
        prompt = encode_prompt(flux, [scene.caption for scene in scenes])
        columns = [encode_images(flux, images)]
        if extra:
            columns.append(extra(flux, scenes, images, rng))
        rows.append([*columns, prompt.txt, prompt.pooled])
        first = first or scenes
    return to_columns(rows), first


def to_columns(rows: list[list[Tensor]]) -> list[Tensor]:
    """Chunks of columns -> whole columns, on the CPU; what is not an integer in bfloat16."""
    def kept(part: Tensor) -> Tensor:
        return (part.bfloat16() if part.is_floating_point() else part).cpu()

    return [torch.cat([kept(part) for part in column]) for column in zip(*rows)]


def draw(columns: list[Tensor], n: int, generator: torch.Generator, device: torch.device
         ) -> list[Tensor]:
    """n random rows of the columns, in float32."""
    return take(columns, torch.randint(len(columns[0]), (n,), generator=generator), device)


def take(columns: list[Tensor], index: Tensor, device: torch.device) -> list[Tensor]:
    """These rows of the columns, in float32; token ids stay integers."""
    rows = [column[index].to(device) for column in columns]
    return [row.float() if row.is_floating_point() else row for row in rows]
