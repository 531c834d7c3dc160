"""Large pictures in little memory: the autoencoder works through one picture at a time, and through
that in overlapping tiles.

    flux = tile(flux)               tiles as large as the images that the model was made for
    flux = tile(flux, size=512)     smaller ones

    |<--------- size --------->|
    [ tile 1       |  overlap  ]            a quarter of the side, in which one tile fades
                   [  overlap  |       tile 2 ]                          into the next

A tile knows nothing of the others: its GroupNorms measure the tile alone. So a tiled picture
    differs a little from one that was decoded whole, and tiling is off unless it is asked for: a
    seed is to give the same picture on every machine. A picture that is not larger than a tile is
    decoded whole, as without. Seam: model -> model. Reference: diffusers'
    `AutoencoderKL.enable_tiling` and `enable_slicing`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..flux import Flux
from .wrapping import shallow_copy, wrap_forward


def tile(flux: Flux, size: int | None = None) -> Flux:
    """The model whose autoencoder reads and paints pictures one by one, those wider or higher than
    `size` pixels in tiles.

    size: a multiple of 32 (default: the width of the model's own pictures). Raises ValueError for
        another number, and for a model without an autoencoder. The given model stays as it is."""
    if flux.autoencoder is None:
        raise ValueError("this model was loaded without an autoencoder, so there is nothing "
                         "to do in tiles: add vae/ to its folder")
    size, down = flux.config.size if size is None else size, flux.autoencoder.config.downscale
    if type(size) is not int or size < 4 * down or size % (4 * down):
        raise ValueError(f"the size of a tile is {size!r}: expected a multiple of {4 * down} "
                         "pixels, whose quarter is whole latent pixels")
    encoder = wrap_forward(flux.autoencoder.encoder, OneByOne(size, Fraction(1, down)))
    decoder = wrap_forward(flux.autoencoder.decoder, OneByOne(size // down, Fraction(down)))
    autoencoder = shallow_copy(flux.autoencoder, encoder=encoder, decoder=decoder)
    return replace(flux, autoencoder=autoencoder)


@dataclass(frozen=True)
class OneByOne:
    """Wraps a `forward`: images (B, C, h, w) one after the other, in tiles where a side is larger
    than `size`.

    scale: a side after the call, divided by that side before it."""

    size: int
    scale: Fraction

    def __call__(self, module: nn.Module, call: Callable, x: Tensor) -> Tensor:
        whole = max(x.shape[2:]) <= self.size
        if whole:
            return torch.cat([call(image) for image in x.split(1)])
        return torch.cat([in_tiles(call, image, self.size, self.scaled) for image in x.split(1)])

    def scaled(self, side: int) -> int:
        return int(side * self.scale)


def in_tiles(call: Callable, x: Tensor, size: int, scaled: Callable[[int], int]) -> Tensor:
    """x (1, C, h, w) -> (1, ·, scaled(h), scaled(w)), tile by tile; scaled: a side before the call
    -> after it."""
    step, overlap, out, above = size - size // 4, scaled(size // 4), None, []
    keep = scaled(step)
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            part = call(x[:, :, top:top + size, left:left + size])
            # Note: with neighbours that are blended already; first with the tile above, then with
            # the one to the left.
            if above:
                blend(above[len(row)], part, overlap, dim=2)
            if row:
                blend(row[-1], part, overlap, dim=3)
            row.append(part)
            if out is None:
                out = part.new_empty(1, part.shape[1], *map(scaled, x.shape[2:]))
            y, x0 = scaled(top), scaled(left)
            out[:, :, y:y + keep, x0:x0 + keep] = part[:, :, :keep, :keep]
        above = row
    return out


def blend(before: Tensor, part: Tensor, overlap: int, dim: int) -> None:
    """Lets the first `overlap` rows (dim 2) or columns (dim 3) of a tile emerge from the last ones
    of the tile before it."""
    # Note: at the picture's edge a tile may be smaller than the overlap
    extent = min(overlap, part.shape[dim])
    weight = torch.arange(extent, device=part.device, dtype=part.dtype) / extent
    emerging = part.narrow(dim, 0, extent)
    last = before.narrow(dim, before.shape[dim] - extent, extent)
    emerging.copy_(torch.lerp(last, emerging, weight[:, None] if dim == 2 else weight))
