"""Towers that see: networks that learn which caption belongs to which picture, of which Redux and the IP-Adapter begin.

    s_ij = exp(a) x_i · y_j + b                            x_i from a picture, y_j from a caption, both of unit length
    SigLIP:  loss = -1/B sum_ij log sigmoid(±s_ij)         + where i = j                      (Zhai et al. 2023, arXiv:2303.15343)
    CLIP:    loss = (CE_j(s_ij, i) + CE_i(s_ij, j)) / 2    among all captions its own, and the other way round (arXiv:2103.00020)

x_i is what the tower sees in a picture, y_j what the base model's CLIP makes of a caption, each through a linear map. Half of the batches
show all their objects on the same ground: there only the objects tell which caption is whose.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux import Flux
from ..prompt import Prompt, encode_prompt
from .grounds import GROUNDS
from .scenes import render, sample_scene
from .train_autoencoder import to_tensor
from .train_flow import BATCH
from .training import train

Look = Callable[[nn.Module, Tensor], Tensor]                 # (tower, pictures (B, 3, S, S) in [-1, 1]) -> (B, hidden)


class Pairing(nn.Module):
    """A tower, and what its loss needs besides: pictures (B, 3, S, S), their captions -> logits of all pairs (B, B)."""

    def __init__(self, tower: nn.Module, look: Look, loss_of: Callable[[Tensor], Tensor], hidden: int, width: int):
        super().__init__()
        self.tower, self.look, self.loss_of = tower, look, loss_of
        self.picture_map, self.text_map = nn.Linear(hidden, width), nn.Linear(width, width)
        # Note: as one pair in B is right, b begins at about the logarithm of these odds: the paper's -10 belongs to batches of 32,768.
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(math.log(10))), nn.Parameter(torch.tensor(-math.log(BATCH)))
        nn.init.normal_(tower.vision_model.embeddings.position_embedding.weight, std=tower.config.hidden_size ** -0.5)

    def forward(self, pictures: Tensor, captions: Prompt) -> Tensor:
        x, y = self.picture_map(self.look(self.tower, pictures)), self.text_map(captions.pooled)        # (B, width) each
        return self.logit_scale.exp() * F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T + self.logit_bias

    def loss(self, pictures: Tensor, captions: Prompt) -> Tensor:
        return self.loss_of(self(pictures, captions))


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Of the logits of all pairs (B, B), those on the diagonal are to be right, all others wrong."""
    right = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(right * logits).sum() / len(logits)


def softmax_loss(logits: Tensor) -> Tensor:
    """In each row and in each column of the logits of all pairs (B, B), that on the diagonal is to be the largest."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pairs(flux: Flux, rng: random.Random, count: int, held_out: bool = False) -> tuple[Tensor, Prompt]:
    """`count` new pictures (count, 3, 128, 128) and their captions, encoded; half of the time all on one ground."""
    ground = rng.choice(GROUNDS) if rng.random() < 0.5 and not held_out else None
    scenes = [sample_scene(rng, ground=ground, canonical=True, held_out=held_out) for _ in range(count)]
    captions = encode_prompt(flux, [scene.caption for scene in scenes])
    pictures = to_tensor(np.stack([render(scene) for scene in scenes])).to(captions.pooled.device)
    return pictures, Prompt(captions.txt.clone(), captions.pooled.clone())                            # clones may be learnt from


def learn_pairs(folder: Path, base: Flux, make: Callable[[], nn.Module], *, steps: int | None, minutes: float | None, lr: float, seed: int
                ) -> dict[str, Tensor]:
    """Learn which caption belongs to which picture: the averaged weights of the network that `make` makes, one like `Pairing`. The log says
    for how many of 64 held-out pictures the caption that is most alike is their own."""
    torch.manual_seed(0)
    device = base.mmdit.img_in.weight.device
    net, unseen = make().to(device), pairs(base, random.Random(0), 64, held_out=True)

    def loss(generator: torch.Generator) -> Tensor:
        batch = pairs(base, random.Random(int(torch.randint(2**62, (), generator=generator))), BATCH)
        with torch.autocast(device.type, torch.bfloat16):
            return net.loss(*batch)

    @torch.no_grad()
    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = make().to(device)
        averaged.load_state_dict(ema)
        found = averaged(*unseen).argmax(1).cpu()
        return {"own caption found": float((found == torch.arange(len(found))).float().mean())}

    return train(net, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=seed, on_save=on_save)


def below(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of the module `name`: below({"tower.a": 1, "b": 2}, "tower") = {"a": 1}."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def share(part: float, steps: int | None, minutes: float | None) -> dict[str, float | None]:
    """Of the length of a run, in steps or in minutes."""
    return {"steps": steps and max(1, round(part * steps)), "minutes": minutes and part * minutes}
