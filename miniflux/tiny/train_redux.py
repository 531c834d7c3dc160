"""Stage 9: to read pictures as it reads text: Redux, with a SigLIP of its own. The model itself stays as it is.

    siglip:  loss = -1/B sum_ij log sigmoid(s_ij (exp(a) x_i · y_j + b))            s_ij = 1 where i = j, else -1
    redux:   loss = ‖v(x_t, t, "" ⊕ redux(siglip(picture)), w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

First a small SigLIP learns which caption belongs to which picture (Zhai et al. 2023, arXiv:2303.15343): x_i is the mean of a picture's
tokens, y_j what the base model's CLIP makes of a caption, each through a linear map and of unit length. Then Redux's embedder learns to
say with such tokens, which follow those of the empty prompt, what is to be painted: half of the time the very picture that was read, half
of the time the same objects on the same ground in another place, so that the results are variations. The last two terms are what
guidance w changes in the base model, of a caption that describes the picture; Redux sees no caption.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux import Flux
from ..images import save
from ..networks.attention import attention_backend
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..prompt import encode_prompt
from ..redux import redux
from ..sampling import image_ids, text_ids
from . import export
from .grounds import SIDE as PIXELS
from .scenes import Scene, contact_sheet, render, sample_scene
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, encode_variant, guidance_change, side_by_side
from .training import train

SIGLIP = SigLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=PIXELS, patch_size=16)
FIRST = 1 / 3                       # the share of the steps or minutes in which SigLIP learns


class Pairing(nn.Module):
    """A SigLIP, and what its loss needs besides: pictures (B, 3, S, S), captions' vectors (B, width) -> logits of all pairs (B, B)."""

    def __init__(self, width: int):
        super().__init__()
        self.siglip = SigLIP(SIGLIP)
        self.picture_map, self.text_map = nn.Linear(SIGLIP.hidden_size, width), nn.Linear(width, width)
        # Note: as one pair in B is right, b begins at about the logarithm of these odds: the paper's -10 belongs to batches of 32,768.
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(math.log(10))), nn.Parameter(torch.tensor(-math.log(BATCH)))
        nn.init.normal_(self.siglip.vision_model.embeddings.position_embedding.weight, std=SIGLIP.hidden_size ** -0.5)

    def forward(self, pictures: Tensor, vec: Tensor) -> Tensor:
        x, y = self.picture_map(self.siglip(pictures).mean(1)), self.text_map(vec)          # (B, width) each
        return self.logit_scale.exp() * F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T + self.logit_bias


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Of the logits of all pairs (B, B), those on the diagonal are to be right, all others wrong."""
    right = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(right * logits).sum() / len(logits)


class Reader(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1] -> text tokens (B, N, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.siglip, self.redux = SigLIP(SIGLIP), ReduxEmbedder(ReduxConfig(SIGLIP.hidden_size, width))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.redux(self.siglip(pictures))


def moved(scene: Scene, rng: random.Random) -> Scene:
    """The same facts elsewhere: all objects are moved together, as far as there is room, and the ground has other details."""
    dx = rng.randint(-min(o.x for o in scene.objects), PIXELS - max(o.x + o.size for o in scene.objects))
    dy = rng.randint(-min(o.y for o in scene.objects), PIXELS - max(o.y + o.size for o in scene.objects))
    return replace(scene, objects=tuple(replace(o, x=o.x + dx, y=o.y + dy) for o in scene.objects), seed=rng.getrandbits(32))


def read_pictures(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    """What Redux reads where these pictures are to be painted: (n, 3, 128, 128)."""
    return to_tensor(np.stack([picture if rng.random() < 0.5 else render(moved(scene, rng)) for scene, picture in zip(scenes, pictures)]))


def pairs(flux: Flux, rng: random.Random, count: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """`count` new pictures (count, 3, 128, 128) and their captions' vectors (count, width)."""
    scenes = [sample_scene(rng, held_out=held_out) for _ in range(count)]
    vec = encode_prompt(flux, [scene.caption for scene in scenes]).vec
    return to_tensor(np.stack([render(scene) for scene in scenes])).to(vec.device), vec.clone()        # a clone may be learnt from


def train_siglip(folder: Path, base: Flux, steps: int | None, minutes: float | None, lr: float) -> dict[str, Tensor]:
    """Learn which caption belongs to which picture; the averaged weights of SigLIP. The log says for how many of 64 held-out pictures
    the caption that is most alike is their own."""
    torch.manual_seed(0)
    device, width = base.mmdit.img_in.weight.device, base.mmdit.config.vec_in_dim
    net, unseen = Pairing(width).to(device), pairs(base, random.Random(0), 64, held_out=True)

    def loss(generator: torch.Generator) -> Tensor:
        batch = pairs(base, random.Random(int(torch.randint(2**62, (), generator=generator))), BATCH)
        with torch.autocast(device.type, torch.bfloat16):
            return sigmoid_loss(net(*batch))

    @torch.no_grad()
    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Pairing(width).to(device)
        averaged.load_state_dict(ema)
        found = averaged(*unseen).argmax(1).cpu()
        return {"own caption found": float((found == torch.arange(len(found))).float().mean())}

    weights = train(net, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=8, on_save=on_save)
    return {name.removeprefix("siglip."): value for name, value in weights.items() if name.startswith("siglip.")}


def train_embedder(folder: Path, base: Flux, siglip: dict[str, Tensor], steps: int | None, minutes: float | None, count: int,
                   lr: float) -> None:
    """Learn to say with the tokens of `count` pictures what the base model is to paint; SigLIP goes on learning with the embedder. Writes
    both into the folder above, as `add_redux` takes them."""
    torch.manual_seed(0)
    *columns, shown = encode_variant(base, read_pictures, count, seed=70)        # z, pictures to read, encoded captions
    mmdit, nothing = base.mmdit.requires_grad_(False), encode_prompt(base, "")
    device, width = mmdit.img_in.weight.device, mmdit.config.context_in_dim
    txt, vec = nothing.txt.clone().expand(BATCH, -1, -1), nothing.vec.clone().expand(BATCH, -1)
    ids = image_ids(SIDE, SIDE, device=device)
    short, long = (text_ids(txt.shape[1] + more, device=device) for more in (0, SIGLIP.num_patches))
    reader = Reader(width).to(device)
    reader.siglip.load_state_dict(siglip)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(columns[0]), (BATCH,), generator=generator)
        tokens, pictures, *said = (part[index].to(device, torch.float32) for part in columns)
        x, t, target = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            guidance = guidance_change(mmdit, x, *said, t, w, ids, short)
            v = mmdit(x, torch.cat([txt, reader(pictures)], dim=1), vec, t, w, ids, long)
        return (v.float() - target - guidance.float()).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Reader(width).to(device)
        averaged.load_state_dict(ema)
        flux, given = replace(base, siglip=averaged.siglip, redux=averaged.redux), [render(scene) for scene in shown[:SHOWN]]
        painted = [redux(flux, picture, steps=16, progress=False)[0] for picture in given]
        pictures, captions = side_by_side(given, painted, [scene.caption for scene in shown[:SHOWN]])
        save(contact_sheet([np.asarray(picture) for picture in pictures], captions), folder.parent / "sheet.png", {"step": step})
        export.write_redux(folder.parent, averaged.siglip, averaged.redux)
        return {"sheet": str(folder.parent / "sheet.png")}

    train(reader, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=9, on_save=on_save)


def run(folder: Path, base: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train SigLIP and Redux's embedder for the model `base`, which stays as it is; writes both into the folder.

    Each has its own state in a folder below: a run that was killed goes on in the one that it was killed in."""
    first, then = ((steps and max(1, round(share * steps)), minutes and share * minutes) for share in (FIRST, 1 - FIRST))
    siglip = train_siglip(folder / "siglip", base, *first, lr)
    train_embedder(folder / "embedder", base, siglip, *then, scenes, lr)
