"""Stage 10: to follow a picture in the place of a prompt: an IP-Adapter, with a CLIP vision tower of its own. The model stays as it is.

    loss = ‖v_base(x_t, t, "", w; K, V) - v_base(x_t, t, caption, w)‖²

First CLIP's vision tower learns which caption belongs to which picture (`towers.py`). Then the adapter learns to make a few tokens of its
vector, and of these the keys K and values V that the image tokens look at besides in the double blocks (Ye et al. 2023,
arXiv:2308.06721, in XLabs' form): they are to do without a prompt what the caption does. The base model is a better teacher than the
pictures: what it says with the caption has no noise in it that no caption could tell. Half of the pictures show the same objects in another
place.
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
from ..images import CLIP_COLOURS, standardise
from ..networks.attention import attention_backend
from ..networks.clip import CLIPVision, CLIPVisionConfig
from ..networks.mmdit import KeysValues
from ..prompt import encode_prompt
from ..sampling import image_ids, text_ids
from . import export
from .grounds import SIDE as PIXELS
from .pairs import moved
from .scenes import Scene, render
from .towers import Pairing, below, learn_pairs, share, softmax_loss
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, encode_variant, side_by_side
from .training import train, write_sheet

CLIP_VISION = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=PIXELS,
                               patch_size=16, projection_dim=128)
TOKENS = 4                          # that a picture becomes, as in XLabs' v1
FIRST = 1 / 3                       # of the steps or minutes are CLIP's alone


def look(clip: CLIPVision, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] -> their vectors (B, projection_dim)."""
    return clip(standardise(pictures / 2 + 0.5, CLIP_COLOURS))


def pairing(width: int) -> Pairing:
    """A CLIP vision tower that is to learn."""
    clip = CLIPVision(CLIP_VISION)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=CLIP_VISION.hidden_size ** -0.5)
    return Pairing(clip, look, softmax_loss, CLIP_VISION.projection_dim, width)


def pictures_to_read(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    """What is read where these pictures are to be painted, half of them with all objects moved: (n, 3, 128, 128)."""
    return to_tensor(np.stack([picture if rng.random() < 0.5 else render(moved(scene, rng)) for scene, picture in zip(scenes, pictures)]))


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
    *columns, shown = encode_variant(base, pictures_to_read, count, seed=80)     # z, pictures to read, encoded captions
    mmdit, nothing = base.mmdit.requires_grad_(False), encode_prompt(base, "")
    device = mmdit.img_in.weight.device
    ids = image_ids(SIDE, SIDE, device=device), text_ids(nothing.txt.shape[1], device=device)
    follower, no_txt, no_vec = Follower(base).to(device), nothing.txt.clone().expand(BATCH, -1, -1), nothing.vec.clone().expand(BATCH, -1)
    follower.clip.load_state_dict(clip)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(columns[0]), (BATCH,), generator=generator)
        tokens, pictures, txt, vec = (part[index].to(device, torch.float32) for part in columns)
        x, t, _ = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            with torch.no_grad():
                target = mmdit(x, txt, vec, t, w, *ids)
            v = mmdit(x, no_txt, no_vec, t, w, *ids, image_kv=follower(pictures))
        return (v.float() - target.float()).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Follower(base).to(device)
        averaged.load_state_dict(ema)
        flux, given = replace(base, image_encoder=averaged.clip, ip_adapters=(averaged.adapter,)), [render(scene) for scene in shown[:SHOWN]]
        painted = [generate(flux, "", steps=16, progress=False, ip_image=picture)[0] for picture in given]
        export.write_ip_adapter(folder.parent, averaged.clip, averaged.adapter)
        return write_sheet(folder.parent, step, *side_by_side(given, painted, [scene.caption for scene in shown[:SHOWN]]))

    train(follower, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=11, on_save=on_save)


def run(folder: Path, base: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train CLIP's vision tower and an IP-Adapter for the model `base`, which stays as it is; writes both into the folder.

    Each has its own state in a folder below: a run that was killed goes on in the one that it was killed in."""
    clip = below(learn_pairs(folder / "clip", base, lambda: pairing(base.mmdit.config.vec_in_dim), lr=lr, seed=10,
                             **share(FIRST, steps, minutes)), "tower")
    train_adapter(folder / "adapter", base, clip, scenes, lr=lr, **share(1 - FIRST, steps, minutes))
