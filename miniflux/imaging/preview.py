"""Previews: how an image emerges, without the autoencoder's decoder.

    miniflux preview photos/*.png --model dev --output dev-preview.safetensors
    python -m miniflux.generate "a fox" --model dev --preview-with dev-preview.safetensors

Sixteen latent channels encode 8x8 pixels. A linear map of them (48 weights and 3 biases) gives the
mean colour of these pixels fairly well. It is fitted by least squares to the autoencoder's latents
of some images. TAEF1's small decoder (`madebyollin/taef1`), which draws details too, can take its
place.
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
from ..command import Parser, command, say
from ..files import atomic_write
from ..flux import Flux
from ..latents import encode
from ..loading import load
from .images import natural_size, preprocess
from .reading import ImageLike, read_each, size_of


def fit_preview(flux: Flux, images: ImageLike | list[ImageLike]) -> Tensor:
    """The linear map from latents to colours.

    flux: the model whose autoencoder encodes the images.
    images: what to fit it to.

    Returns (3, 17): 16 weights and a bias for red, green and blue in [0, 1]."""
    latents, colours = [], []
    for image in read_each(images):
        size = natural_size(size_of(image), flux.config.size ** 2)
        pixels = preprocess([image], *size)                                     # (1, 3, H, W)
        z = encode(flux, pixels).cpu()                                          # (1, 16, h, w)
        mean = F.adaptive_avg_pool2d(pixels / 2 + 0.5, z.shape[-2:])            # (1, 3, h, w)
        latents.append(z[0].flatten(1).t())                                     # (h·w, 16)
        colours.append(mean[0].flatten(1).t())                                  # (h·w, 3)
    x = F.pad(torch.cat(latents).double(), (0, 1), value=1.0)                   # (·, 17)
    y = torch.cat(colours).double()                                             # (·, 3)
    # Note: few images, or flat ones, do not determine the map: of all that fit, take the smallest.
    return torch.linalg.lstsq(x, y, driver="gelsd").solution.t().float()


def load_preview(source: str | os.PathLike, flux: Flux) -> Callable[[Tensor], Tensor]:
    """A function from latents (B, 16, h, w) to images (B, 3, 8h, 8w) in [0, 1].

    It runs on the model's device.

    source: a file of `fit_preview`'s map, or TAEF1's decoder as a file, a folder or a Hub id.

    Raises FileNotFoundError for a missing file, ValueError for a file that is neither."""
    path = find_network(source, "preview")
    device = next(flux.mmdit.parameters()).device
    table = read_preview(path, device)
    if table is None:
        decoder = load_taef1(path, device)
        return lambda z: decoder(z.to(next(decoder.parameters()))).float().clamp(0, 1)
    channels = flux.mmdit.config.out_channels // 4
    if table.shape[1] != channels + 1:
        raise ValueError(f"{path} maps {table.shape[1] - 1} latent channels, "
                         f"the model has {channels}: fit one with it by miniflux preview")
    return lambda z: linear_preview(table, z)


def linear_preview(table: Tensor, z: Tensor) -> Tensor:
    """(3, 17), (B, 16, h, w) -> (B, 3, 8h, 8w) in [0, 1]."""
    weight, bias = table[:, :-1], table[:, -1, None, None]
    colours = torch.einsum("cz,bzhw->bchw", weight, z.float()) + bias           # (B, 3, h, w)
    return F.interpolate(colours, scale_factor=8, mode="bilinear").clamp(0, 1)


@command
def main() -> None:
    parser = Parser(prog="miniflux preview",
                    description="Fit the linear map from latents to colours.")
    parser.add_argument("images", nargs="+",
                        help="images to fit it to: photographs, or images of the model")
    parser.add_argument("--model", default="tiny",
                        help="the model: a name, a Hub id or a folder (default tiny)")
    parser.add_argument("--output", default="preview.safetensors",
                        help="the file to write (default preview.safetensors)")
    parser.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    args = parser.parse_args()
    try:
        output = Path(args.output)
        if output.suffix != ".safetensors" or not output.parent.is_dir():
            raise ValueError(f"the output {output} must end in .safetensors, "
                             "in a folder that exists")
        table = fit_preview(load(args.model, device=args.device), args.images)
        with atomic_write(output) as partial:
            save_file({"preview": table.contiguous()}, partial)
        say(output)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
