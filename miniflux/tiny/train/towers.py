"""Vision towers: networks that learn which caption belongs to which image. Redux and the IP-Adapter
begin with them.

    s_ij = exp(a) x_i · y_j + b          x_i from an image, y_j from a caption, both of unit length
    SigLIP:  loss = -1/B sum_ij log sigmoid(±s_ij)    + where i = j        (arXiv:2303.15343)
    CLIP:    loss = (CE_j(s_ij, i) + CE_i(s_ij, j)) / 2                    (arXiv:2103.00020)

x_i is the tower's output for an image, y_j that of the base model's CLIP for a caption, each
through a linear map. Half of the batches show all their objects on the same ground: there only the
objects tell the captions apart.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...flux import Flux
from ...prompt import Prompt, encode_prompt
from ..world.grounds import GROUNDS
from ..world.rendering import render
from ..world.scenes import sample_scene
from .data import BATCH, normalize
from .loop import train
from .precision import training_mode

# (tower, images (B, 3, S, S) in [-1, 1]) -> a vector for each (B, hidden)
Pool = Callable[[nn.Module, Tensor], Tensor]


class Pairing(nn.Module):
    """A tower with the maps that its loss needs: images (B, 3, S, S) and their captions -> logits
    of all pairs (B, B)."""

    def __init__(self, tower: nn.Module, pool: Pool, loss_of: Callable[[Tensor], Tensor],
                 hidden: int, width: int):
        super().__init__()
        self.tower, self.pool, self.loss_of = tower, pool, loss_of
        self.image_map = nn.Linear(hidden, width)
        self.text_map = nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        # Note: as one pair in B is right, b begins at about the logarithm of these odds: the
        # paper's -10 belongs to batches of 32,768.
        self.logit_bias = nn.Parameter(torch.tensor(-math.log(BATCH)))
        positions = tower.vision_model.embeddings.position_embedding.weight
        nn.init.normal_(positions, std=tower.config.hidden_size ** -0.5)

    def forward(self, images: Tensor, captions: Prompt) -> Tensor:
        x = self.image_map(self.pool(self.tower, images))                       # (B, width)
        y = self.text_map(captions.pooled)                                         # (B, width)
        x, y = (F.normalize(vectors.float(), dim=-1) for vectors in (x, y))
        return self.logit_scale.exp() * x @ y.T + self.logit_bias

    def loss(self, images: Tensor, captions: Prompt) -> Tensor:
        return self.loss_of(self(images, captions))


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Of the logits of all pairs (B, B), those on the diagonal are right, all others wrong."""
    right = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(right * logits).sum() / len(logits)


def softmax_loss(logits: Tensor) -> Tensor:
    """In each row and in each column of the logits of all pairs (B, B), that on the diagonal should
    be the largest."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def sample_pairs(flux: Flux, rng: random.Random, count: int, held_out: bool = False
                 ) -> tuple[Tensor, Prompt]:
    """`count` new images (count, 3, 128, 128) and their captions, encoded; half of the time all on
    one ground."""
    ground = rng.choice(GROUNDS) if rng.random() < 0.5 and not held_out else None
    scenes = [sample_scene(rng, ground=ground, canonical=True, held_out=held_out)
              for _ in range(count)]
    captions = encode_prompt(flux, [scene.caption for scene in scenes])
    images = normalize([render(scene) for scene in scenes]).to(captions.pooled.device)
    return images, captions


def learn_pairs(folder: Path, base: Flux, make: Callable[[], nn.Module], *, steps: int | None,
                minutes: float | None, lr: float, seed: int) -> dict[str, Tensor]:
    """Learn which caption belongs to which image: the averaged weights of the network that `make`
    makes, one like `Pairing`. The log counts for how many of 64 held-out images the caption that is
    most alike is their own."""
    torch.manual_seed(0)
    device = base.mmdit.img_in.weight.device
    net = make().to(device)
    unseen = sample_pairs(base, random.Random(0), 64, held_out=True)

    def loss(generator: torch.Generator) -> Tensor:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        with torch.no_grad():
            batch = sample_pairs(base, rng, BATCH)
        with training_mode(device):
            return net.loss(*batch)

    @torch.no_grad()
    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = make().to(device)
        averaged.load_state_dict(ema)
        found = averaged(*unseen).argmax(1).cpu()
        return {"own caption found": float((found == torch.arange(len(found))).float().mean())}

    return train(net, loss, folder, lr=lr, batch=BATCH, steps=steps, minutes=minutes, seed=seed,
                 on_save=on_save)


def submodule_weights(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of the module `name`: submodule_weights({"tower.a": 1, "b": 2}, "tower") = {"a": 1}."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items()
            if key.startswith(f"{name}.")}


def share(part: float, steps: int | None, minutes: float | None) -> dict[str, float | None]:
    """A part of the length of a run, in steps or in minutes."""
    return {"steps": steps and max(1, round(part * steps)), "minutes": minutes and part * minutes}
