"""Pictures <-> latents, the sixteen-channel small pictures in which FLUX.1 paints, and how few of them serve many."""

import torch
from torch import Tensor

from .flux import Flux


def spread(given: Tensor | None, x: Tensor) -> Tensor | None:
    """One for each of the pictures x, on their device, from as many as divide them evenly: a, b -> a, a, b, b."""
    if given is None:
        return None
    if len(x) % len(given):
        raise ValueError(f"{len(given)} pictures are given for {len(x)} to paint: give one, or one for each prompt")
    return given.to(x.device).repeat_interleave(len(x) // len(given), dim=0)


@torch.no_grad()
def encode(flux: Flux, pictures: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] -> latents (n, 16, H/8, W/8), float32."""
    if flux.autoencoder is None:
        raise ValueError("this model was loaded without an autoencoder, which has to read the picture: add vae/ to its folder")
    return flux.autoencoder.encode(pictures.to(next(flux.autoencoder.parameters()))).float()


@torch.no_grad()
def decode(flux: Flux, z: Tensor) -> Tensor:
    """Latents (n, 16, h, w) -> pictures (n, 3, 8h, 8w) in [0, 1], float32."""
    check_autoencoder(flux)
    pictures = flux.autoencoder.decode(z.to(next(flux.autoencoder.parameters()))).float()
    return (pictures / 2 + 0.5).clamp(0, 1)


def check_autoencoder(flux: Flux) -> None:
    """Raises ValueError for a model without an autoencoder, which has to decode the latents."""
    if flux.autoencoder is None:
        raise ValueError('this model was loaded without an autoencoder: ask for output="latents", or add vae/ to its folder')
