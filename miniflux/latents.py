"""Images <-> latents: an eighth of the size, sixteen channels; the form that FLUX.1 works on."""

import copy
import logging

import torch
from torch import Tensor

from .flux import Flux
from .networks.autoencoder import Autoencoder

log = logging.getLogger("miniflux")


@torch.no_grad()
def encode(flux: Flux, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] -> latents (n, 16, H/8, W/8), float32."""
    if flux.autoencoder is None:
        raise ValueError("this model was loaded without an autoencoder, which has to encode the "
                         "image: add vae/ to its folder")
    return flux.autoencoder.encode(images.to(next(flux.autoencoder.parameters()))).float()


@torch.no_grad()
def decode(flux: Flux, z: Tensor) -> Tensor:
    """Latents (n, 16, h, w) -> images (n, 3, 8h, 8w) in [0, 1], float32.

    Where the device's memory is too small, one after the other; where it is too small even for one,
    on the CPU: the steps that led to z have cost more."""
    check_autoencoder(flux)
    images = None
    for batch in dict.fromkeys((max(len(z), 1), 1)):
        try:
            images = decode_in(batch, flux.autoencoder, z)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    if images is None:
        log.warning("the device's memory is too small to decode this image: the CPU does it, which "
                    "takes longer")
        images = decode_in(1, copy.deepcopy(flux.autoencoder).to("cpu"), z)
    return (images.to(z.device) / 2 + 0.5).clamp(0, 1)


def decode_in(batch: int, autoencoder: Autoencoder, z: Tensor) -> Tensor:
    """Images (n, 3, 8h, 8w) in [-1, 1], so many at a time."""
    weight = next(autoencoder.parameters())
    return torch.cat([autoencoder.decode(part.to(weight)).float() for part in z.split(batch)])


def check_autoencoder(flux: Flux) -> None:
    """Raises ValueError for a model without an autoencoder, which has to decode the latents."""
    if flux.autoencoder is None:
        raise ValueError("this model was loaded without an autoencoder: ask for "
                         'output="latents", or add vae/ to its folder')
