"""Stage 9: to read pictures as it reads text: Redux, with a SigLIP of its own. The model itself stays as it is.

    d_ij = mean (redux(siglip(picture_i)) - t5(caption_j))²
    words:     loss = mean_i d_ii + (CE_j(-exp(a) d_ij, i) + CE_i(-exp(a) d_ij, j)) / 20
    pictures:  loss = ‖v_base(x_t, t, "" ⊕ redux(siglip(picture)), w) - v_base(x_t, t, caption, w)‖²

First a small SigLIP learns which caption belongs to which picture (`towers.py`). Then Redux's embedder learns to say of a picture what T5
says of its caption, token for token, as often as there is room: nearest to what is said of the picture shall be its own caption. The
distance alone would be content with the words that most captions share; what tells two captions apart is a small part of it. Last it
learns to be understood: where its tokens follow those of the empty prompt, the model is to do what it does with the caption. (From this
alone it would learn next to nothing for long: the model's velocity says little of which word was wrong.)

Captions tell objects, colours, the ground and how things stand to each other, but no places: so the results are variations.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..flux import Flux
from ..networks.attention import attention_backend
from ..networks.mmdit import MMDiTInputs
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..prompt import Prompt, encode_prompt
from ..redux import redux
from ..sampling import image_ids, text_ids
from . import export
from .grounds import SIDE as PIXELS
from .scenes import Scene, render
from .towers import Pairing, below, learn_pairs, share, sigmoid_loss, softmax_loss
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, encode_variant, side_by_side
from .training import train, write_sheet

SIGLIP = SigLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=PIXELS, patch_size=16)
SHARES = 0.25, 0.5, 0.25            # of the steps or minutes: SigLIP's alone, words, pictures


def pairing(width: int) -> Pairing:
    """A SigLIP that is to learn; what it sees in a picture is the mean of its tokens."""
    return Pairing(SigLIP(SIGLIP), lambda siglip, pictures: siglip(pictures).mean(1), sigmoid_loss, SIGLIP.hidden_size, width)


class Reader(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1], their captions -> logits of all pairs (B, B), by the distance of the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.siglip, self.redux = SigLIP(SIGLIP), ReduxEmbedder(ReduxConfig(SIGLIP.hidden_size, width))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def read(self, pictures: Tensor) -> Tensor:
        return self.redux(self.siglip(pictures))                                                   # (B, N, width)

    def distances(self, pictures: Tensor, captions: Prompt) -> Tensor:
        said = self.read(pictures)                                                                 # (B, N, width)
        txt = captions.txt.repeat(1, said.shape[1] // captions.txt.shape[1], 1)                    # (B, N, width)
        return torch.cdist(said.flatten(1).float(), txt.flatten(1)).square() / txt[0].numel()      # (B, B)

    def forward(self, pictures: Tensor, captions: Prompt) -> Tensor:
        return -self.logit_scale.exp() * self.distances(pictures, captions)

    def loss(self, pictures: Tensor, captions: Prompt) -> Tensor:
        d = self.distances(pictures, captions)
        return d.diagonal().mean() + softmax_loss(-self.logit_scale.exp() * d) / 10


def pictures_themselves(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    return to_tensor(pictures)


def train_to_be_understood(folder: Path, base: Flux, reader: Reader, count: int, *, steps: int | None, minutes: float | None,
                           lr: float) -> None:
    """Learn from `count` scenes to do without a caption what the caption does. Writes SigLIP and the embedder into the folder above, as
    `add_redux` takes them."""
    *columns, shown = encode_variant(base, pictures_themselves, count, seed=70)                    # z, pictures, encoded captions
    mmdit, nothing = base.mmdit.requires_grad_(False), encode_prompt(base, "")
    device = mmdit.img_in.weight.device
    reader.to(device)
    txt, vec = nothing.txt.clone().expand(BATCH, -1, -1), nothing.pooled.clone().expand(BATCH, -1)
    ids = image_ids(SIDE, SIDE, device=device)
    short, long = (text_ids(txt.shape[1] + more, device=device) for more in (0, SIGLIP.num_patches))

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(columns[0]), (BATCH,), generator=generator)
        tokens, pictures, *caption = (part[index].to(device, torch.float32) for part in columns)
        x, t, _ = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            with torch.no_grad():
                target = mmdit(MMDiTInputs(x, *caption, t, w, ids, short))
            v = mmdit(MMDiTInputs(x, torch.cat([txt, reader.read(pictures)], dim=1), vec, t, w, ids, long))
        return (v.float() - target.float()).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Reader(txt.shape[-1]).to(device)
        averaged.load_state_dict(ema)
        flux, given = replace(base, siglip=averaged.siglip, redux=averaged.redux), [render(scene) for scene in shown[:SHOWN]]
        painted = [redux(flux, picture, steps=16, progress=False)[0] for picture in given]
        export.write_redux(folder.parent, averaged.siglip, averaged.redux)
        return write_sheet(folder.parent, step, *side_by_side(given, painted, [scene.caption for scene in shown[:SHOWN]]))

    train(reader, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=12, on_save=on_save)


def run(folder: Path, base: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train SigLIP and Redux's embedder for the model `base`, which stays as it is; writes both into the folder.

    Each step has its own state in a folder below: a run that was killed goes on in the one that it was killed in."""
    sizes = base.mmdit.config
    first, words, pictures = (share(part, steps, minutes) for part in SHARES)
    siglip = below(learn_pairs(folder / "siglip", base, lambda: pairing(sizes.vec_in_dim), lr=lr, seed=8, **first), "tower")

    def make() -> Reader:
        reader = Reader(sizes.context_in_dim)
        reader.siglip.load_state_dict(siglip)                                                      # which goes on learning
        return reader

    reader = make()
    reader.load_state_dict(learn_pairs(folder / "words", base, make, lr=lr, seed=9, **words))
    train_to_be_understood(folder / "pictures", base, reader, scenes, lr=lr, **pictures)
