"""Stage 1: the autoencoder of the tiny FLUX learns to squeeze 128x128 pictures into 16x16x16 numbers and back.

    loss = |x̂ - x| + (x̂ - x)² + ½ |∇x̂ - ∇x| + KL(q(z|x) ‖ N(0, 1)) · weight

A variational autoencoder (Kingma & Welling 2013): the gradient term keeps edges sharp without a second network, the
divergence keeps the latents smooth enough to be painted by the transformer. Crops of 64x64 are enough to learn from.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import save, to_pil
from ..networks.autoencoder import Autoencoder, AutoencoderConfig
from .scenes import contact_sheet, render, sample_scene
from .training import train

CONFIG = AutoencoderConfig(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, num_groups=8, scale_factor=1.0, shift_factor=0.0)
CROP, BATCH, KL_WEIGHT = 64, 16, 1e-3


def pictures(count: int, seed: int) -> np.ndarray:
    """`count` rendered scenes (count, 128, 128, 3) uint8."""
    rng = random.Random(seed)
    return np.stack([render(sample_scene(rng)) for _ in range(count)])


def to_tensor(batch: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def loss_function(net: Autoencoder, x: Tensor, generator: torch.Generator) -> Tensor:
    mean, log_variance = net.encoder(x).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    z = mean + torch.exp(log_variance / 2) * torch.randn(mean.shape, generator=generator).to(mean)
    y = net.decoder(z).float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x)))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def psnr(net: Autoencoder, x: Tensor) -> tuple[float, Tensor]:
    """Mean peak signal-to-noise ratio in dB over pictures (B, 3, H, W), and what the autoencoder made of them."""
    y = net.decode(net.encode(x)).float().clamp(-1, 1)
    return float((10 * torch.log10(4 / (y - x).square().mean(dim=(1, 2, 3)))).mean()), y


def run(folder: Path, steps: int | None, minutes: float | None, device: torch.device, scenes: int,
        start: dict[str, Tensor] | None = None) -> tuple[float, float]:
    """Train; returns the scale and the shift that give the latents of unseen pictures unit variance and zero mean.

    start: weights to begin with. Only the decoder learns then: a transformer that paints such latents still fits."""
    torch.manual_seed(0)
    net = Autoencoder(CONFIG).to(device, memory_format=torch.channels_last)
    if start is not None:
        net.load_state_dict(start)
        net.encoder.requires_grad_(False)
    data, unseen = pictures(scenes, seed=1), to_tensor(pictures(64, seed=2)).to(device)

    def loss_of(generator: torch.Generator) -> Tensor:
        index, y, x = (torch.randint(high, (BATCH,), generator=generator).tolist()
                       for high in (len(data), 128 - CROP + 1, 128 - CROP + 1))
        batch = to_tensor(np.stack([data[i, a:a + CROP, b:b + CROP] for i, a, b in zip(index, y, x)])).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return loss_function(net, batch.contiguous(memory_format=torch.channels_last), generator)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Autoencoder(CONFIG).to(device)
        averaged.load_state_dict(ema)
        value, painted = psnr(averaged, unseen)
        both = [np.asarray(picture) for picture in to_pil(torch.cat([unseen[:8], painted[:8]]) / 2 + 0.5)]
        save(contact_sheet(both, ["unseen scene"] * 8 + ["decoded"] * 8), folder / "sheet.png", {"step": step})
        z = averaged.encode(unseen).detach()
        return {"psnr": value, "shift": float(z.mean()), "scale": float(1 / z.std())}

    ema = train(net, loss_of, folder, lr=2e-3 if start is None else 1e-3, steps=steps, minutes=minutes, seed=0, on_save=on_save)
    final = on_save(0, ema)
    return final["scale"], final["shift"]
