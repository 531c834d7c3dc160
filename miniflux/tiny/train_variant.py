"""Stage 4: what the base model learns besides, as a LoRA with a wider first layer: to fill holes, to follow edges or depths.

    W' = W + B A                               only A (rank, in) and B (out, rank) learn; B, and the further channels, begin at zero
    loss = ‖v(x_t ⊕ c, t, caption, w) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

c are the further channels of each image token. The last two terms are what guidance w changes in the base model: so the variant
learns from true pictures and keeps its guidance. This is the form in which Black Forest Labs published their Canny and Depth LoRAs.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ..control import control
from ..fill import fill, fill_channels
from ..flux import Flux
from ..latents import encode
from ..networks.attention import attention_backend
from ..networks.mmdit import MMDiT, MMDiTInputs
from ..prompt import encode_prompt
from ..sampling import image_ids, patchify, text_ids
from .pairs import depth_map, edges, hole
from .scenes import Scene, render, sample_scene
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .training import train, write_sheet

RANK, KEPT = 32, 24                 # of the factors while they learn, and in the file
SHOWN = 16                          # pictures on a sample sheet
FILL_GUIDANCE = 30 / 3.5            # fill's guidance is 30 where the base model's is 3.5


def fill_inputs(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    holes = torch.from_numpy(np.stack([hole(scene, rng) for scene in scenes]))[:, None].float()
    return fill_channels(flux, to_tensor(pictures), holes)                      # (n, N, 320)


def edge_inputs(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    return patchify(encode(flux, to_tensor(np.stack([edges(picture) for picture in pictures]))))


def depth_inputs(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    return patchify(encode(flux, to_tensor(np.stack([depth_map(scene) for scene in scenes]))))


# Variant -> (its further channels, what its guidance counts in units of the base model's).
VARIANTS: dict[str, tuple[Callable, float]] = {"fill": (fill_inputs, FILL_GUIDANCE), "canny": (edge_inputs, 1.0), "depth": (depth_inputs, 1.0)}


class LowRank(nn.Module):
    """A change of a weight: W -> W + B A."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns) / columns ** 0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def widen(mmdit: MMDiT, further: int) -> None:
    """Gives the network's first layer further input channels, which it does not use yet."""
    mmdit.img_in.weight = nn.Parameter(F.pad(mmdit.img_in.weight, (0, further)))
    mmdit.img_in.in_features += further
    mmdit.config = replace(mmdit.config, in_channels=mmdit.config.in_channels + further)


def with_factors(net: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Gives each linear layer a change to learn, and nothing else; layer -> its change."""
    net.requires_grad_(False)
    changes = {}
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear):
            changes[name] = LowRank(layer.weight, rank)
            register_parametrization(layer, "weight", changes[name])
    return changes


@torch.no_grad()
def encode_variant(flux: Flux, inputs: Callable, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Scene]]:
    """`count` scenes: their tokens, further channels and encoded captions, all in bfloat16; and the first scenes."""
    rng, columns, kept = random.Random(seed), [], []
    flux.autoencoder.to(memory_format=torch.channels_last)
    for begin in range(0, count, 64):
        scenes = [sample_scene(rng) for _ in range(min(64, count - begin))]
        pictures = np.stack([render(scene) for scene in scenes])
        prompt = encode_prompt(flux, [scene.caption for scene in scenes])
        with torch.autocast(prompt.txt.device.type, torch.bfloat16):
            z, beside = patchify(encode(flux, to_tensor(pictures))), inputs(flux, scenes, pictures, rng)
        columns.append([part.bfloat16().cpu() for part in (z, beside, prompt.txt, prompt.pooled)])
        kept += scenes[:64 - len(kept)]
    return *map(torch.cat, zip(*columns)), kept


@torch.no_grad()
def guidance_change(base: MMDiT, x: Tensor, txt: Tensor, vec: Tensor, t: Tensor, w: Tensor, *ids: Tensor) -> Tensor:
    """What guidance w changes in the base model's velocity: (B, N, 64)."""
    guided, plain = (base(MMDiTInputs(x, txt, vec, t, scale, *ids)) for scale in (w, torch.ones_like(w)))
    return guided - plain


def reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (rank, in) and (out, rank) whose product is the nearest to B A of that rank (Eckart and Young 1936)."""
    U, s, V = torch.linalg.svd(B @ A, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def write_lora(path: Path, changes: dict[str, LowRank], weights: dict[str, Tensor]) -> None:
    """The learnt factors, reduced in rank, under the names of BFL's Control LoRAs, in bfloat16."""
    factors = {}
    for name in changes:
        A, B = reduced(*(weights[f"{name}.parametrizations.weight.0.{kind}"].float() for kind in "AB"), KEPT)
        factors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    partial = path.with_suffix(".part")
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in factors.items()}, partial)
    partial.replace(path)


def train_lora(folder: Path, net: nn.Module, changes: dict[str, LowRank], loss: Callable[[torch.Generator], Tensor],
               show: Callable[[], tuple[list, list[str]]], *, steps: int | None, minutes: float | None, lr: float, seed: int,
               file: str = "lora.safetensors", write: Callable[[Path, dict[str, LowRank], dict[str, Tensor]], None] = write_lora) -> None:
    """Learn the changes of a network's layers. Into the folder: the LoRA, and a sheet of what `show()` paints with it: (pictures,
    captions). Both are of the averaged weights."""

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        now = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(ema)
        pictures, captions = show()
        net.load_state_dict(now)
        write(folder / file, changes, ema)
        return write_sheet(folder, step, pictures, captions)

    train(net, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=seed, on_save=on_save)


def side_by_side(given: list, painted: list, captions: list[str]) -> tuple[list, list[str]]:
    """Each picture after what it was made of, for a sheet."""
    return [picture for pair in zip(given, painted) for picture in pair], [text for caption in captions for text in ("", caption)]


def run(folder: Path, variant: str, base: Flux, student: Flux, steps: int | None, minutes: float | None, scenes: int, lr: float) -> None:
    """Train a variant of the model `base` (`student` is another copy of it, which is changed); writes its LoRA into the folder."""
    torch.manual_seed(0)
    inputs, unit = VARIANTS[variant]
    z, beside, txt, vec, shown = encode_variant(base, inputs, scenes, seed=20)
    mmdit = student.mmdit
    widen(mmdit, beside.shape[-1])
    changes = with_factors(mmdit)
    device = mmdit.img_in.weight.device
    ids = image_ids(SIDE, SIDE, device=device), text_ids(txt.shape[1], device=device)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(z), (BATCH,), generator=generator)
        tokens, further, *c = (part[index].to(device, torch.float32) for part in (z, beside, txt, vec))
        x, t, target = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            guidance = guidance_change(base.mmdit, x, *c, t, w, *ids)
            v = mmdit(MMDiTInputs(torch.cat([x, further], dim=-1), *c, t, unit * w, *ids))
        return (v.float() - target - guidance.float()).square().mean()

    def show() -> tuple[list, list[str]]:
        pictures, masks = np.stack([render(scene) for scene in shown[:SHOWN]]), random.Random(1)
        keywords, captions = dict(steps=16, progress=False), [scene.caption for scene in shown[:SHOWN]]
        if variant == "fill":
            holes = [np.uint8(255) * hole(scene, masks) for scene in shown[:SHOWN]]
            painted = fill(student, captions, list(pictures), holes, **keywords)
            given = [np.where(mask[..., None] > 0, 128, picture).astype(np.uint8) for mask, picture in zip(holes, pictures)]
        else:
            given = [edges(picture) if variant == "canny" else depth_map(scene) for scene, picture in zip(shown, pictures)]
            painted = control(student, captions, given, **keywords)
        return side_by_side(given, painted, captions)

    train_lora(folder, mmdit, changes, loss, show, steps=steps, minutes=minutes, lr=lr, seed=3)
