"""Large pictures in little memory: the autoencoder works through one picture at a time, and through that in overlapping tiles.

    flux = tile(flux)                       tiles as large as the pictures that the model was made for (1024 pixels a side)
    flux = tile(flux, size=512)             smaller ones

    |<--------- size --------->|
    [ tile 1       |  overlap  ]            a quarter of the side; there the weight moves evenly from the first tile to the
                   [  overlap  |       tile 2 ]                                                           second

A tile knows nothing of the others: its GroupNorms measure the tile alone. So a tiled picture differs a little from one that was
decoded whole, and tiling is off unless it is asked for: a seed is to give the same picture on every machine. A picture that is not
larger than a tile is decoded whole, as without. Seam: model -> model. Reference: diffusers' `AutoencoderKL.enable_tiling` and
`enable_slicing`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..flux import Flux
from .around import around, with_parts


def tile(flux: Flux, size: int | None = None) -> Flux:
    """The model whose autoencoder reads and paints pictures one by one, those wider or higher than `size` pixels in tiles.

    size: a multiple of 32 (default: the width of the model's own pictures). Raises ValueError for another number, and for a model
    without an autoencoder. The given model stays as it is."""
    if flux.autoencoder is None:
        raise ValueError("this model was loaded without an autoencoder, so there is nothing to do in tiles: add vae/ to its folder")
    size, down = flux.config.size if size is None else size, flux.autoencoder.config.downscale
    if type(size) is not int or size < 4 * down or size % (4 * down):
        raise ValueError(f"the size of a tile is {size!r}: expected a multiple of {4 * down} pixels, whose quarter is whole latent pixels")
    encoder = around(flux.autoencoder.encoder, partial(one_by_one, size=size, scaled=lambda pixels: pixels // down))
    decoder = around(flux.autoencoder.decoder, partial(one_by_one, size=size // down, scaled=lambda latents: latents * down))
    return replace(flux, autoencoder=with_parts(flux.autoencoder, encoder=encoder, decoder=decoder))


def one_by_one(call: Callable, x: Tensor, size: int, scaled: Callable[[int], int]) -> Tensor:
    """call(x) for x (B, C, h, w), one picture after the other, in tiles where they are larger than `size`."""
    whole = max(x.shape[2:]) <= size
    return torch.cat([call(picture) if whole else in_tiles(call, picture, size, scaled) for picture in x.split(1)])


def in_tiles(call: Callable, x: Tensor, size: int, scaled: Callable[[int], int]) -> Tensor:
    """x (1, C, h, w) -> (1, ·, scaled(h), scaled(w)), tile by tile; scaled: a side before the call -> after it."""
    step, overlap, out, above = size - size // 4, scaled(size // 4), None, []
    keep = scaled(step)
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            part = call(x[:, :, top:top + size, left:left + size])
            # Note: with neighbours that are blended already; first with the tile above, then with the one to the left.
            if above:
                blend(above[len(row)], part, overlap, dim=2)
            if row:
                blend(row[-1], part, overlap, dim=3)
            row.append(part)
            if out is None:
                out = part.new_empty(1, part.shape[1], *map(scaled, x.shape[2:]))
            out[:, :, scaled(top):scaled(top) + keep, scaled(left):scaled(left) + keep] = part[:, :, :keep, :keep]
        above = row
    return out


def blend(before: Tensor, part: Tensor, overlap: int, dim: int) -> None:
    """Lets the first `overlap` rows (dim 2) or columns (dim 3) of a tile emerge from the last ones of the tile before it."""
    extent = min(overlap, part.shape[dim])                  # Note: at the picture's edge a tile may be smaller than the overlap
    weight = torch.arange(extent, device=part.device, dtype=part.dtype) / extent
    emerging = part.narrow(dim, 0, extent)
    last = before.narrow(dim, before.shape[dim] - extent, extent)
    emerging.copy_(torch.lerp(last, emerging, weight[:, None] if dim == 2 else weight))
