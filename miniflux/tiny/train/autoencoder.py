"""Stage 1: the autoencoder of the tiny FLUX learns to compress 128x128 images to 16x16x16 latents.

    loss = mean m · (|d| + 2 d² + 0.7 |∇d|) + 1e-4 · KL(q(z|x) ‖ N(0, 1))            d = x̂ - x

A variational autoencoder (Kingma & Welling 2013). The gradient term keeps edges sharp without a
second network; the divergence keeps the latents smooth enough for the transformer to predict.

Most pixels of a scene are a flat ground, which is soon learnt. So the weight m is three times as
large on the pixels of objects, and every crop of 64x64 contains some of them. The figure to watch
is the PSNR of object pixels: on whole images the ground flatters the mean.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...imaging.images import to_pil
from ...imaging.saving import save
from ...networks.autoencoder import Autoencoder, AutoencoderConfig
from ..world.grounds import IMAGE_SIZE
from ..world.rendering import contact_sheet, object_masks, render
from ..world.scenes import GRID, sample_scene
from ..world.words import ALL_OBJECTS
from .data import normalize
from .loop import train
from .precision import training_mode

CONFIG = AutoencoderConfig(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, num_groups=8,
                           scale_factor=1.0, shift_factor=0.0)
CROP = 64
BATCH = 8
OBJECT_WEIGHT = 3.0                      # of an object's pixel, where one of the ground counts 1
SQUARES, GRADIENTS, KL = 2.0, 0.7, 1e-4  # weights of the terms of the loss
LEARNING_RATE = 1e-3
ON_GRID = 0.75                           # the share of crops that begin on the grid of the boxes


def sample_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rendered scenes (count, 128, 128, 3) uint8, of all objects that have a glyph, and where their
    objects are: (count, 128, 128) bool."""
    rng = random.Random(seed)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    masks = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), bool)
    for i in range(count):
        scene = sample_scene(rng, objects=ALL_OBJECTS)
        images[i] = render(scene)
        masks[i] = object_masks(scene).any(0)
    return images, masks


def crop_around_object(mask: np.ndarray, rng: random.Random) -> tuple[slice, slice]:
    """A square of `CROP` pixels that contains a random object pixel of the mask (128, 128)."""
    rows, columns = np.nonzero(mask)
    pixel = rng.randrange(len(rows))
    step = GRID if rng.random() < ON_GRID else 1
    corner = []
    for at in (int(rows[pixel]), int(columns[pixel])):
        low = max(at - CROP + 1, 0)
        high = min(at, IMAGE_SIZE - CROP)
        corner.append(rng.randint(-(-low // step), high // step) * step)
    y, x = corner
    return slice(y, y + CROP), slice(x, x + CROP)


def reconstruction_loss(y: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Distance of y from x (B, 3, H, W), object pixels (B, H, W) weighted."""
    m = 1 + (OBJECT_WEIGHT - 1) * mask[:, None].to(x)                           # (B, 1, H, W)
    m = m / m.mean()
    d = y - x
    edges = ((m[..., 1:] * d.diff(dim=-1).abs()).mean()
             + (m[..., 1:, :] * d.diff(dim=-2).abs()).mean())
    return (m * (d.abs() + SQUARES * d.square())).mean() + GRADIENTS * edges


def loss_function(net: Autoencoder, x: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    mean, log_variance = net.encoder(x).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    y = net.decoder(mean + torch.exp(log_variance / 2) * noise).float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction_loss(y, x, mask) + KL * kl


@torch.no_grad()
def round_trip(net: Autoencoder, x: Tensor) -> Tensor:
    """What the autoencoder makes of images (B, 3, H, W) in [-1, 1]."""
    return torch.cat([net.decode(net.encode(part)) for part in x.split(16)]).float().clamp(-1, 1)


def psnr(y: Tensor, x: Tensor, mask: Tensor | None = None) -> float:
    """Mean over images (B, 3, H, W) in [-1, 1] of the peak signal-to-noise ratio in dB; with a
    mask (B, H, W), of its pixels alone."""
    squares = (y - x).square().mean(1)                                          # (B, H, W)
    mask = torch.ones_like(squares) if mask is None else mask.to(squares)
    mean = (squares * mask).sum((1, 2)) / mask.sum((1, 2))                      # (B,)
    return float((10 * torch.log10(4 / mean)).mean())


def run(folder: Path, device: torch.device, scenes: int, start: dict[str, Tensor] | None = None,
        decoder_only: bool = False, *, steps: int | None, minutes: float | None
        ) -> tuple[float, float]:
    """Train; returns the scale and the shift that give the latents of unseen images unit variance
    and zero mean.

    start: weights to begin with.
    decoder_only: keep the encoder as it is, so that a transformer which was trained on its latents
        still fits."""
    torch.manual_seed(0)
    net = Autoencoder(CONFIG).to(device)
    if start is not None:
        net.load_state_dict(start)
    net.encoder.requires_grad_(not decoder_only)
    images, masks = sample_images(scenes, seed=1)
    unseen, unseen_masks = sample_images(64, seed=2)
    x, mask = normalize(unseen).to(device), torch.from_numpy(unseen_masks).to(device)

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        crops, crop_masks = [], []
        for i in rng.choices(range(len(images)), k=BATCH):
            crop = crop_around_object(masks[i], rng)
            crops.append(images[i][crop])
            crop_masks.append(masks[i][crop])
        batch = normalize(np.stack(crops)).to(device)
        mask = torch.from_numpy(np.stack(crop_masks)).to(device)
        with training_mode(device):
            return loss_function(net, batch, mask, generator)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Autoencoder(CONFIG).to(device)
        averaged.load_state_dict(ema)
        y = round_trip(averaged, x)
        both = [np.asarray(image) for image in to_pil(torch.cat([x[:16], y[:16]]) / 2 + 0.5)]
        both = both[:8] + both[16:24] + both[8:16] + both[24:]
        captions = (["unseen scene"] * 8 + ["decoded"] * 8) * 2
        save(contact_sheet(both, captions), folder / "sheet.png", {"step": step})
        with torch.no_grad():
            z = averaged.encode(x)
        return {"psnr": psnr(y, x), "psnr of objects": psnr(y, x, mask),
                "shift": float(z.mean()), "scale": float(1 / z.std())}

    ema = train(net, loss_of, folder, lr=LEARNING_RATE, batch=BATCH, steps=steps,
                minutes=minutes, seed=0, on_save=on_save)
    final = on_save(0, ema)
    return final["scale"], final["shift"]
