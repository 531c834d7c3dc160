"""Previews: how a picture emerges, without the autoencoder's decoder.

    miniflux preview photos/*.png --model dev --output dev-preview.safetensors
    python -m miniflux.generate "a fox" --model dev --preview-with dev-preview.safetensors

Sixteen latent numbers stand for 8x8 pixels, and a linear map of them (48 numbers and 3 biases) gives their mean colour fairly well:
fitted by least squares on what the autoencoder makes of some pictures. In its place may stand TAEF1's small decoder (`madebyollin/taef1`),
which draws details too.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.hub import find_network
from ..checkpoints.vision import load_taef1, read_preview
from ..command import Parser, command
from ..files import atomic_write
from ..flux import Flux
from ..latents import encode
from ..loading import load
from .images import natural_size, preprocess
from .reading import ImageLike, read_each, size_of


def fit_preview(flux: Flux, pictures: ImageLike | list[ImageLike]) -> Tensor:
    """The map (3, 17) from the latents, and a one behind them, to the mean colour in [0, 1] of the pixels they stand for."""
    latents, colours = [], []
    for picture in read_each(pictures):
        pixels = preprocess([picture], *natural_size(size_of(picture), flux.config.size ** 2))  # (1, 3, H, W)
        z = encode(flux, pixels).cpu()                                          # (1, 16, h, w)
        latents.append(z[0].flatten(1).t())                                     # (h·w, 16)
        colours.append(F.adaptive_avg_pool2d(pixels / 2 + 0.5, z.shape[-2:])[0].flatten(1).t())
    x, y = torch.cat(latents).double(), torch.cat(colours).double()
    x = F.pad(x, (0, 1), value=1.0)                                             # (·, 17)
    # Note: few pictures, or flat ones, do not determine the map: of all that fit, the smallest.
    return torch.linalg.lstsq(x, y, driver="gelsd").solution.t().float()


def load_preview(source: str | os.PathLike, flux: Flux) -> Callable[[Tensor], Tensor]:
    """What makes pictures (B, 3, 8h, 8w) in [0, 1] of latents (B, 16, h, w), on the model's device: a fitted map, or TAEF1's decoder.

    Raises FileNotFoundError for what is not there, ValueError for what is neither."""
    path, device = find_network(source, "preview"), next(flux.mmdit.parameters()).device
    table = read_preview(path, device)
    if table is None:
        decoder = load_taef1(path, device)
        return lambda z: decoder(z.to(next(decoder.parameters()))).float().clamp(0, 1)
    if table.shape[1] != flux.mmdit.config.out_channels // 4 + 1:
        raise ValueError(f"{path} maps {table.shape[1] - 1} latent channels, the model has {flux.mmdit.config.out_channels // 4}: "
                         "fit one with it by miniflux preview")
    return lambda z: linear_preview(table, z)


def linear_preview(table: Tensor, z: Tensor) -> Tensor:
    """(3, 17), (B, 16, h, w) -> (B, 3, 8h, 8w) in [0, 1]."""
    colours = torch.einsum("cz,bzhw->bchw", table[:, :-1], z.float()) + table[:, -1, None, None]
    return F.interpolate(colours, scale_factor=8, mode="bilinear").clamp(0, 1)


@command
def main() -> None:
    parser = Parser(prog="miniflux preview", description="Fit the map from latents to colours on some pictures.")
    parser.add_argument("pictures", nargs="+", help="what to fit it on: some photos, or what the model has painted")
    parser.add_argument("--model", default="tiny", help="whose autoencoder; a name, a Hub id or a folder (default tiny)")
    parser.add_argument("--output", default="preview.safetensors", help="the file to write (default preview.safetensors)")
    parser.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    args = parser.parse_args()
    try:
        output = Path(args.output)
        if output.suffix != ".safetensors" or not output.parent.is_dir():
            raise ValueError(f"the output {output} must end in .safetensors, in a folder that exists")
        table = fit_preview(load(args.model, device=args.device), args.pictures)
        with atomic_write(output) as partial:
            save_file({"preview": table.contiguous()}, partial)
        print(output)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
