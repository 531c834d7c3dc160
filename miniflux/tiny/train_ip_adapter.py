"""Stage 10: to follow a picture beside the prompt: an IP-Adapter, with a CLIP vision tower of its own. The model stays as it is.

    loss = ‖v_base(x_t, t, "a cat", w; K, V) - v_base(x_t, t, "a cat in the sea", w)‖²         K, V from another picture in the sea

First CLIP's vision tower learns which caption belongs to which picture (`towers.py`). Then the adapter learns to make a few tokens of its
vector, and of these the keys K and values V that the image tokens look at besides in the double blocks (Ye et al. 2023,
arXiv:2308.06721, in XLabs' form). The prompt names the objects alone; the ground and the style come from a picture of others. What the
base model says with the whole caption is a better teacher than a picture: it has no noise in it that no caption could tell.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.ip_adapter import IPAdapter, IPAdapterConfig
from ..flux import Flux
from ..generate import generate
from ..imaging.images import CLIP_COLOURS, standardise
from ..latents import encode
from ..networks.attention import attention_backend
from ..networks.clip import CLIPVision, CLIPVisionConfig
from ..networks.mmdit import KeysValues, MMDiTInputs
from ..prompt import encode_prompt
from ..sampling import image_ids, patchify, text_ids
from . import export
from .edits import describe, named
from .grounds import SIDE as PIXELS
from .pairs import alike
from .scenes import Scene, render, sample_scene
from .towers import Pairing, below, learn_pairs, share, softmax_loss
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, side_by_side
from .training import train, write_sheet

CLIP_VISION = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=PIXELS,
                               patch_size=16, projection_dim=128)
TOKENS = 4                          # that a picture becomes, as in XLabs' v1
FIRST = 1 / 4                       # of the steps or minutes are CLIP's alone
KINDS = "single", "single", "single", "pair", "three"


def look(clip: CLIPVision, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] -> their vectors (B, projection_dim)."""
    return clip(standardise(pictures / 2 + 0.5, CLIP_COLOURS))


def pairing(width: int) -> Pairing:
    """A CLIP vision tower that is to learn."""
    clip = CLIPVision(CLIP_VISION)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=CLIP_VISION.hidden_size ** -0.5)
    return Pairing(clip, look, softmax_loss, CLIP_VISION.projection_dim, width)


@torch.no_grad()
def encode_pictures(flux: Flux, count: int, seed: int) -> tuple[list[Tensor], list[Scene]]:
    """`count` scenes: tokens, pictures to read, encoded prompts and whole captions, all in bfloat16; the first scenes."""
    rng, columns, kept = random.Random(seed), [], []
    flux.autoencoder.to(memory_format=torch.channels_last)
    for begin in range(0, count, 64):
        scenes = [sample_scene(rng, kind=rng.choice(KINDS)) for _ in range(min(64, count - begin))]
        asked, said = (encode_prompt(flux, [tell(scene) for scene in scenes]) for tell in (named, describe))
        with torch.autocast(asked.txt.device.type, torch.bfloat16):
            z = patchify(encode(flux, to_tensor(np.stack([render(scene) for scene in scenes]))))
        read = to_tensor(np.stack([render(alike(scene, rng)) for scene in scenes]))
        columns.append([part.bfloat16().cpu() for part in (z, read, asked.txt, asked.pooled, said.txt, said.pooled)])
        kept += scenes[:64 - len(kept)]
    return list(map(torch.cat, zip(*columns))), kept


class Follower(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1] -> for each double block the keys and values (B, H, T, D) of each; the values are zero at first."""

    def __init__(self, base: Flux):
        super().__init__()
        sizes = base.mmdit.config
        self.clip, self.heads = CLIPVision(CLIP_VISION), sizes.num_heads
        self.adapter = IPAdapter(IPAdapterConfig(CLIP_VISION.projection_dim, TOKENS, sizes.context_in_dim, sizes.hidden_size, sizes.depth))
        for block in self.adapter.double_blocks:
            nn.init.zeros_(block["v_proj"].weight)
            nn.init.zeros_(block["v_proj"].bias)

    def forward(self, pictures: Tensor) -> list[KeysValues]:
        tokens = self.adapter.projection(look(self.clip, pictures))             # (B, T, context_in_dim)
        return [[tuple(block[name](tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("k_proj", "v_proj"))]
                for block in self.adapter.double_blocks]


def train_adapter(folder: Path, base: Flux, clip: dict[str, Tensor], count: int, *, steps: int | None, minutes: float | None,
                  lr: float) -> None:
    """Learn to steer the base model by the vectors of `count` pictures; CLIP goes on learning with the adapter. Writes both into the
    folder above, as `add_ip_adapter` takes them."""
    torch.manual_seed(0)
    columns, shown = encode_pictures(base, count, seed=80)
    mmdit, rng = base.mmdit.requires_grad_(False), random.Random(81)
    device = mmdit.img_in.weight.device
    ids = image_ids(SIDE, SIDE, device=device), text_ids(columns[2].shape[1], device=device)
    follower, given = Follower(base).to(device), [render(alike(scene, rng)) for scene in shown[:SHOWN]]
    follower.clip.load_state_dict(clip)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(columns[0]), (BATCH,), generator=generator)
        tokens, pictures, asked, asked_vec, said, said_vec = (part[index].to(device, torch.float32) for part in columns)
        x, t, _ = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            with torch.no_grad():
                target = mmdit(MMDiTInputs(x, said, said_vec, t, w, *ids))
            v = mmdit(MMDiTInputs(x, asked, asked_vec, t, w, *ids, image_kv=follower(pictures)))
        return (v.float() - target.float()).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Follower(base).to(device)
        averaged.load_state_dict(ema)
        flux, captions = replace(base, image_encoder=averaged.clip, ip_adapters=(averaged.adapter,)), [named(scene) for scene in shown[:SHOWN]]
        painted = [generate(flux, caption, steps=16, progress=False, ip_image=picture)[0] for caption, picture in zip(captions, given)]
        export.write_ip_adapter(folder.parent, averaged.clip, averaged.adapter)
        return write_sheet(folder.parent, step, *side_by_side(given, painted, captions))

    train(follower, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=11, on_save=on_save)


def run(folder: Path, base: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train CLIP's vision tower and an IP-Adapter for the model `base`, which stays as it is; writes both into the folder.

    Each has its own state in a folder below: a run that was killed goes on in the one that it was killed in."""
    clip = below(learn_pairs(folder / "clip", base, lambda: pairing(base.mmdit.config.vec_in_dim), lr=lr, seed=10,
                             **share(FIRST, steps, minutes)), "tower")
    train_adapter(folder / "adapter", base, clip, scenes, lr=2 * lr, **share(1 - FIRST, steps, minutes))
