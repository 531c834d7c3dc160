"""Stage 10: to follow an image beside the prompt: an IP-Adapter, with a CLIP vision tower of its
own. The model stays as it is.

    loss = ‖v_base(x_t, t, "a cat", w; K, V) - v_base(x_t, t, "a cat in the sea", w)‖²

First CLIP's vision tower learns which caption belongs to which image (`towers.py`). Then the
adapter learns to make a few tokens from its vector, and from these the keys K and values V that the
image tokens attend to as well in the double blocks (Ye et al. 2023, arXiv:2308.06721, in XLabs'
form). The prompt names the objects alone; the ground and the style come from an image of others in
the sea. The base model with the whole caption is a better teacher than an image: it has no noise
that no caption could predict.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...adapters.ip_adapter import IPAdapter, IPAdapterConfig
from ...flux import Flux
from ...generate import generate
from ...imaging.images import CLIP_COLOURS, standardise
from ...networks.clip import CLIPVision, CLIPVisionConfig
from ...networks.mmdit import KeysValues
from ...prompt import encode_prompt
from ...sampling import Conditions, distillation_loss
from .. import export
from ..world.edits import describe, named
from ..world.grounds import IMAGE_SIZE
from ..world.pairs import alike
from ..world.rendering import render
from ..world.scenes import Scene, sample_scene
from .data import BATCH, CHUNK, draw, encode_images, normalize, to_columns
from .loop import train, write_sheet
from .lora import SHOWN, side_by_side
from .precision import training_mode
from .towers import Pairing, learn_pairs, share, softmax_loss, submodule_weights
from .velocity import draw_guidance, noise_and_times, velocity

CLIP_VISION = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                               num_attention_heads=2, image_size=IMAGE_SIZE, patch_size=16,
                               projection_dim=128)
TOKENS = 4                               # that an image becomes, as in XLabs' v1
FIRST = 1 / 4                            # the share of the run in which CLIP learns alone
SCENE_KINDS = "single", "single", "single", "pair", "three"
CLIP_LEARNING_RATE, LEARNING_RATE = 1e-3, 2e-3


def clip_vector(clip: CLIPVision, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] -> their vectors (B, projection_dim)."""
    return clip(standardise(images / 2 + 0.5, CLIP_COLOURS))


def pairing(width: int) -> Pairing:
    """A CLIP vision tower that is to learn."""
    clip = CLIPVision(CLIP_VISION)
    std = CLIP_VISION.hidden_size ** -0.5
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=std)
    return Pairing(clip, clip_vector, softmax_loss, CLIP_VISION.projection_dim, width)


@torch.no_grad()
def encode_references(flux: Flux, count: int, seed: int) -> tuple[list[Tensor], list[Scene]]:
    """`count` scenes as columns: latents, reference images, encoded prompts and whole captions (txt
    and pooled of each); and the first scenes."""
    rng = random.Random(seed)
    rows, first = [], []
    for begin in range(0, count, CHUNK):
        scenes = [sample_scene(rng, kind=rng.choice(SCENE_KINDS))
                  for _ in range(min(CHUNK, count - begin))]
        prompts = encode_prompt(flux, [named(scene) for scene in scenes])
        captions = encode_prompt(flux, [describe(scene) for scene in scenes])
        rows.append([
            encode_images(flux, np.stack([render(scene) for scene in scenes])),
            normalize([render(alike(scene, rng)) for scene in scenes]),
            prompts.txt, prompts.pooled, captions.txt, captions.pooled])
        first = first or scenes
    return to_columns(rows), first


class IPAdapterTrainer(nn.Module):
    """CLIP's tower and the adapter: images (B, 3, S, S) in [-1, 1] -> for each double block the
    keys and values (B, H, T, D) of each; the values are zero at first."""

    def __init__(self, base: Flux):
        super().__init__()
        sizes = base.mmdit.config
        self.heads = sizes.num_heads
        self.clip = CLIPVision(CLIP_VISION)
        self.adapter = IPAdapter(IPAdapterConfig(
            CLIP_VISION.projection_dim, TOKENS, sizes.context_in_dim, sizes.hidden_size,
            sizes.depth))
        for block in self.adapter.double_blocks:
            nn.init.zeros_(block["v_proj"].weight)
            nn.init.zeros_(block["v_proj"].bias)

    def forward(self, images: Tensor) -> list[KeysValues]:
        tokens = self.adapter.projection(clip_vector(self.clip, images))        # (B, T, width)
        keys_values = []
        for block in self.adapter.double_blocks:
            k, v = (block[name](tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                    for name in ("k_proj", "v_proj"))                           # (B, H, T, D)
            keys_values.append([(k, v)])
        return keys_values


def train_adapter(folder: Path, base: Flux, clip: dict[str, Tensor], count: int, *,
                  steps: int | None, minutes: float | None) -> None:
    """Learn to steer the base model by the vectors of `count` images; CLIP goes on learning with
    the adapter. Writes both into the folder above, as `add_ip_adapter` takes them."""
    torch.manual_seed(0)
    columns, first = encode_references(base, count, seed=80)
    mmdit, rng = base.mmdit.requires_grad_(False), random.Random(81)
    device = mmdit.img_in.weight.device
    trainer = IPAdapterTrainer(base).to(device)
    trainer.clip.load_state_dict(clip)
    given = [render(alike(scene, rng)) for scene in first[:SHOWN]]

    def loss(generator: torch.Generator) -> Tensor:
        z, images, txt, pooled, *caption = draw(columns, BATCH, generator, device)
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        with training_mode(device):
            student = velocity(mmdit, txt, pooled, w, Conditions(image_kv=trainer(images)))
            return distillation_loss(student, velocity(mmdit, *caption, w), z, eps, t)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = IPAdapterTrainer(base).to(device)
        averaged.load_state_dict(ema)
        export.write_ip_adapter(folder.parent, averaged.clip, averaged.adapter)
        flux = replace(base, image_encoder=averaged.clip, ip_adapters=(averaged.adapter,))
        prompts = [named(scene) for scene in first[:SHOWN]]
        painted = [generate(flux, prompt, steps=16, progress=False, ip_image=image)[0]
                   for prompt, image in zip(prompts, given)]
        return write_sheet(folder.parent, step, *side_by_side(given, painted, prompts))

    train(trainer, loss, folder, lr=LEARNING_RATE, batch=BATCH, steps=steps, minutes=minutes,
          seed=11, on_save=on_save)


def run(folder: Path, base: Flux, scenes: int, *, steps: int | None, minutes: float | None) -> None:
    """Train CLIP's vision tower and an IP-Adapter for the model `base`, which stays as it is;
    writes both into the folder.

    Each has a state of its own in a folder below: a run that was stopped goes on where it was."""
    tower = learn_pairs(folder / "clip", base, lambda: pairing(base.mmdit.config.vec_in_dim),
                        lr=CLIP_LEARNING_RATE, seed=10, **share(FIRST, steps, minutes))
    train_adapter(folder / "adapter", base, submodule_weights(tower, "tower"), scenes,
                  **share(1 - FIRST, steps, minutes))
