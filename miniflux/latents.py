"""Images <-> latents, the images of sixteen channels and an eighth of the size that FLUX.1 works on."""

import torch
from torch import Tensor

from .flux import Flux


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
