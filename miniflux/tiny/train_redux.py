"""Stage 9: to read pictures as it reads text: Redux, with a SigLIP of its own. The model itself stays as it is.

    loss = ‖v(x_t, t, "" ⊕ redux(siglip(picture)), w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

First a small SigLIP learns which caption belongs to which picture (`towers.py`). Then Redux's embedder learns to say with such tokens,
which follow those of the empty prompt, what is to be painted: half of the time the very picture that was read, half of the time the
same objects on the same ground in another place, so that the results are variations. The last two terms are what guidance w changes in
the base model, of a caption that describes the picture; Redux sees no caption.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..flux import Flux
from ..networks.attention import attention_backend
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..prompt import encode_prompt
from ..redux import redux
from ..sampling import image_ids, text_ids
from . import export
from .grounds import SIDE as PIXELS
from .scenes import render
from .towers import Pairing, pictures_to_read, shares, sigmoid_loss, train_tower
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, encode_variant, guidance_change, side_by_side
from .training import train, write_sheet

SIGLIP = SigLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=PIXELS, patch_size=16)


def pairing(width: int) -> Pairing:
    """A SigLIP that is to learn; what it sees in a picture is the mean of its tokens."""
    return Pairing(SigLIP(SIGLIP), lambda siglip, pictures: siglip(pictures).mean(1), SIGLIP.hidden_size, width)


class Reader(nn.Module):
    """Pictures (B, 3, S, S) in [-1, 1] -> text tokens (B, N, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.siglip, self.redux = SigLIP(SIGLIP), ReduxEmbedder(ReduxConfig(SIGLIP.hidden_size, width))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.redux(self.siglip(pictures))


def train_embedder(folder: Path, base: Flux, siglip: dict[str, Tensor], count: int, *, steps: int | None, minutes: float | None,
                   lr: float) -> None:
    """Learn to say with the tokens of `count` pictures what the base model is to paint; SigLIP goes on learning with the embedder. Writes
    both into the folder above, as `add_redux` takes them."""
    torch.manual_seed(0)
    *columns, shown = encode_variant(base, pictures_to_read, count, seed=70)        # z, pictures to read, encoded captions
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
        export.write_redux(folder.parent, averaged.siglip, averaged.redux)
        return write_sheet(folder.parent, step, *side_by_side(given, painted, [scene.caption for scene in shown[:SHOWN]]))

    train(reader, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=9, on_save=on_save)


def run(folder: Path, base: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train SigLIP and Redux's embedder for the model `base`, which stays as it is; writes both into the folder.

    Each has its own state in a folder below: a run that was killed goes on in the one that it was killed in."""
    first, then = shares(steps, minutes)
    siglip = train_tower(folder / "siglip", base, lambda: pairing(base.mmdit.config.vec_in_dim), sigmoid_loss, lr=lr, seed=8, **first)
    train_embedder(folder / "embedder", base, siglip, scenes, lr=lr, **then)
