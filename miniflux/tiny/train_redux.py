"""Stage 9: to read pictures as it reads text: Redux, with a SigLIP of its own. The model itself stays as it is.

    d_ij = mean (redux(siglip(picture_i)) - t5(caption_j))²
    loss = mean_i d_ii + (CE_j(-exp(a) d_ij, i) + CE_i(-exp(a) d_ij, j)) / 20

First a small SigLIP learns which caption belongs to which picture (`towers.py`). Then Redux's embedder learns to say of a picture what T5
says of its caption, token for token, as often as there is room: nearest to what is said of the picture shall be its own caption. The
distance alone would be content with the words that most captions share; what tells two captions apart is a small part of it.

Captions tell objects, colours, the ground and how things stand to each other, but no places: so the results are variations.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..flux import Flux
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..prompt import Prompt
from ..redux import redux
from . import export
from .grounds import SIDE as PIXELS
from .scenes import render, sample_scene
from .towers import Pairing, below, learn_pairs, share, sigmoid_loss, softmax_loss
from .train_variant import SHOWN, side_by_side
from .training import write_sheet

SIGLIP = SigLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=PIXELS, patch_size=16)
FIRST = 1 / 3                       # of the steps or minutes are SigLIP's alone


def pairing(width: int) -> Pairing:
    """A SigLIP that is to learn; what it sees in a picture is the mean of its tokens."""
    return Pairing(SigLIP(SIGLIP), lambda siglip, pictures: siglip(pictures).mean(1), sigmoid_loss, SIGLIP.hidden_size, width)


class Reader(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1], their captions -> logits of all pairs (B, B), by the distance of the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.siglip, self.redux = SigLIP(SIGLIP), ReduxEmbedder(ReduxConfig(SIGLIP.hidden_size, width))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def distances(self, pictures: Tensor, captions: Prompt) -> Tensor:
        said = self.redux(self.siglip(pictures))                                                   # (B, N, width)
        txt = captions.txt.repeat(1, said.shape[1] // captions.txt.shape[1], 1)                    # (B, N, width)
        return torch.cdist(said.flatten(1).float(), txt.flatten(1)).square() / txt[0].numel()      # (B, B)

    def forward(self, pictures: Tensor, captions: Prompt) -> Tensor:
        return -self.logit_scale.exp() * self.distances(pictures, captions)

    def loss(self, pictures: Tensor, captions: Prompt) -> Tensor:
        d = self.distances(pictures, captions)
        return d.diagonal().mean() + softmax_loss(-self.logit_scale.exp() * d) / 10


def run(folder: Path, base: Flux, steps: int | None, minutes: float | None, lr: float) -> None:
    """Train SigLIP and Redux's embedder for the model `base`, which stays as it is; writes both into the folder, as `add_redux` takes them.

    Each has its own state in a folder below: a run that was killed goes on in the one that it was killed in."""
    width, rng = base.mmdit.config.context_in_dim, random.Random(70)
    siglip = below(learn_pairs(folder / "siglip", base, lambda: pairing(base.mmdit.config.vec_in_dim), lr=lr, seed=8,
                               **share(FIRST, steps, minutes)), "tower")
    shown = [sample_scene(rng) for _ in range(SHOWN)]

    def reader() -> Reader:
        reader = Reader(width)
        reader.siglip.load_state_dict(siglip)                                                      # which goes on learning
        return reader

    def show(step: int, reader: Reader) -> dict:
        flux, given = replace(base, siglip=reader.siglip, redux=reader.redux), [render(scene) for scene in shown]
        painted = [redux(flux, picture, steps=16, progress=False)[0] for picture in given]
        export.write_redux(folder, reader.siglip, reader.redux)
        return write_sheet(folder, step, *side_by_side(given, painted, [scene.caption for scene in shown]))

    learn_pairs(folder / "embedder", base, reader, lr=lr, seed=9, show=show, **share(1 - FIRST, steps, minutes))
