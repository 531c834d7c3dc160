"""Stage 9: to read images as the model reads text: Redux, with a SigLIP of its own. The model
itself stays as it is.

    d_ij = mean (redux(siglip(image_i)) - t5(caption_j))²
    words:     loss = mean_i d_ii + (CE_j(-exp(a) d_ij, i) + CE_i(-exp(a) d_ij, j)) / 20
    images:    loss = ‖v_base(x_t, t, "" ⊕ redux(siglip(image)), w) - v_base(x_t, t, caption, w)‖²

First a small SigLIP learns which caption belongs to which image (`towers.py`). Then Redux's
embedder learns to give for an image what T5 gives for its caption, token by token, as often as
there is room; nearest of all captions should be its own. The distance alone would be content with
the words that most captions share: what tells two captions apart is a small part of it. Last it
learns to be understood: where its tokens follow those of the empty prompt, the model should do what
it does with the caption. (From this alone it would learn next to nothing for long: the model's
velocity carries little about which word was wrong.)

Captions name objects, colours, the ground and relations, but no places: the results are variations.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...flux import Flux
from ...networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ...prompt import Prompt, encode_prompt
from ...redux import redux
from ...sampling import distillation_loss
from .. import export
from ..world.grounds import IMAGE_SIZE
from ..world.rendering import render
from ..world.scenes import Scene
from .data import BATCH, draw, encode_scenes, normalize
from .loop import train, write_sheet
from .lora import SHOWN, side_by_side
from .precision import training_mode
from .towers import Pairing, learn_pairs, share, sigmoid_loss, softmax_loss, submodule_weights
from .velocity import draw_guidance, noise_and_times, velocity

SIGLIP = SigLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                      num_attention_heads=2, image_size=IMAGE_SIZE, patch_size=16)
SHARES = 0.25, 0.5, 0.25                 # of the run: SigLIP alone, words, images
LEARNING_RATE = 1e-3


def pairing(width: int) -> Pairing:
    """A SigLIP that is to learn; its vector of an image is the mean of its tokens."""
    return Pairing(SigLIP(SIGLIP), lambda siglip, images: siglip(images).mean(1), sigmoid_loss,
                   SIGLIP.hidden_size, width)


class ReduxReader(nn.Module):
    """SigLIP and Redux's embedder: images (B, 3, S, S) in [-1, 1], their captions -> logits of all
    pairs (B, B), by the distance of the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.siglip = SigLIP(SIGLIP)
        self.redux = ReduxEmbedder(ReduxConfig(SIGLIP.hidden_size, width))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def tokens(self, images: Tensor) -> Tensor:
        return self.redux(self.siglip(images))                                  # (B, N, width)

    def distances(self, images: Tensor, captions: Prompt) -> Tensor:
        tokens = self.tokens(images)                                            # (B, N, width)
        times = tokens.shape[1] // captions.txt.shape[1]
        txt = captions.txt.repeat(1, times, 1)                                  # (B, N, width)
        distances = torch.cdist(tokens.flatten(1).float(), txt.flatten(1))
        return distances.square() / txt[0].numel()                              # (B, B)

    def forward(self, images: Tensor, captions: Prompt) -> Tensor:
        return -self.logit_scale.exp() * self.distances(images, captions)

    def loss(self, images: Tensor, captions: Prompt) -> Tensor:
        d = self.distances(images, captions)
        return d.diagonal().mean() + softmax_loss(-self.logit_scale.exp() * d) / 10


def scene_images(flux: Flux, scenes: list[Scene], images: np.ndarray, rng: random.Random) -> Tensor:
    return normalize(images)


def train_on_velocities(folder: Path, base: Flux, reader: ReduxReader, count: int, *,
                        steps: int | None, minutes: float | None) -> None:
    """Learn from `count` scenes to do without a caption what the caption does. Writes SigLIP and
    the embedder into the folder above, as `add_redux` takes them."""
    columns, first = encode_scenes(base, count, seed=70, extra=scene_images)
    mmdit, empty = base.mmdit.requires_grad_(False), encode_prompt(base, "")
    device = mmdit.img_in.weight.device
    reader.to(device)
    empty_txt = empty.txt.clone().expand(BATCH, -1, -1)
    empty_pooled = empty.pooled.clone().expand(BATCH, -1)

    def loss(generator: torch.Generator) -> Tensor:
        z, images, *text = draw(columns, BATCH, generator, device)
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        with training_mode(device):
            txt = torch.cat([empty_txt, reader.tokens(images).float()], dim=1)  # (B, 32 + N, width)
            student = velocity(mmdit, txt, empty_pooled, w)
            return distillation_loss(student, velocity(mmdit, *text, w), z, eps, t)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = ReduxReader(empty_txt.shape[-1]).to(device)
        averaged.load_state_dict(ema)
        export.write_redux(folder.parent, averaged.siglip, averaged.redux)
        flux = replace(base, siglip=averaged.siglip, redux=averaged.redux)
        given = [render(scene) for scene in first[:SHOWN]]
        painted = [redux(flux, image, steps=16, progress=False)[0] for image in given]
        captions = [scene.caption for scene in first[:SHOWN]]
        return write_sheet(folder.parent, step, *side_by_side(given, painted, captions))

    train(reader, loss, folder, lr=LEARNING_RATE, batch=BATCH, steps=steps, minutes=minutes,
          seed=12, on_save=on_save)


def run(folder: Path, base: Flux, scenes: int, *, steps: int | None, minutes: float | None) -> None:
    """Train SigLIP and Redux's embedder for the model `base`, which stays as it is; writes both
    into the folder.

    Each part has a state of its own in a folder below: a stopped run goes on where it was."""
    sizes = base.mmdit.config
    alone, words, images = (share(part, steps, minutes) for part in SHARES)
    tower = learn_pairs(folder / "siglip", base, lambda: pairing(sizes.vec_in_dim),
                        lr=LEARNING_RATE, seed=8, **alone)
    siglip = submodule_weights(tower, "tower")

    def make() -> ReduxReader:
        reader = ReduxReader(sizes.context_in_dim)
        reader.siglip.load_state_dict(siglip)           # it goes on learning
        return reader

    reader = make()
    learnt = learn_pairs(folder / "words", base, make, lr=LEARNING_RATE, seed=9, **words)
    reader.load_state_dict(learnt)
    train_on_velocities(folder / "images", base, reader, scenes, **images)
