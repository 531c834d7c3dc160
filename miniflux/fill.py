"""Fill: repaint what a mask shows, with the model that was made for it (FLUX.1 Fill), inside a picture or beyond its edge.

    python -m miniflux.fill "a white cup" --model fill --image table.png --mask mask.png
    python -m miniflux.fill "a wide meadow" --model fill --image fox.png --expand 256 0 256 0

Each token carries, beside its 64 latent numbers, 64 of the picture with a grey hole and 256 of the mask: 384 in all. The model
keeps the known part by itself. The seam: what enters the transformer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_switch
from .flux import Flux
from .generate import paint
from .images import Picture, Pictures, fit, read_pictures, size_of, to_tensor
from .latents import encode
from .masks import feather, fit_masks, paste, read_masks
from .prompt import Text
from .sampling import OnFinish, OnStep, patchify
from .settings import resolve


@torch.no_grad()
def fill(flux: Flux, prompt: Text, image: Picture | list[Picture], mask: Picture | list[Picture], *, paste_back: bool = False,
         strength: float = 1.0, width: int | None = None, height: int | None = None, steps: int | None = None,
         guidance: float | None = None, seed: int = 0, num_images: int = 1, negative_prompt: Text | None = None,
         true_cfg: float = 1.0, sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None, output: str = "pil",
         progress: bool = True, on_step: OnStep | None = None, on_finish: OnFinish | None = None) -> Pictures:
    """Fill the white part of a mask after a prompt.

    image, mask: one (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list, one for each prompt; the mask is grey and cut
    at one half. paste_back: keep every pixel outside the mask exactly, with a soft seam inside it; the result then has the
    picture's own size, unless width or height is given. strength: below 1, begin from the picture itself. width, height: by
    default the picture's shape at the model's number of pixels. steps: default 50. guidance: default 30. The other keywords
    are those of `generate`.

    Raises ValueError or FileNotFoundError for what is no picture, an empty mask, a model without the 384 channels, or a value
    out of range. Reference: diffusers' `FluxFillPipeline`, with the mean of the autoencoder's posterior."""
    pictures = read_pictures(image, "image")
    call = resolve("fill", flux, width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg, sigmas,
                   max_text_tokens, output, progress, on_step, on_finish, like=size_of(pictures[0]), strength=strength)
    paste_back = check_switch("paste_back", paste_back)
    masks = read_masks(mask, pictures)
    known, hole = fit(pictures, call.width, call.height), fit_masks(masks, call.width, call.height)
    start = None if strength == 1 and sigmas is None else encode(flux, known)   # at t = 1 nothing is left of it

    def put_back(painted: Tensor) -> Tensor:
        size = size_of(pictures[0]) if width is None and height is None else (call.width, call.height)
        whole = torch.cat([to_tensor(picture, *size) for picture in pictures])
        return paste(painted, whole, feather(fit_masks(masks, *size)))

    return paint(flux, prompt, call, start=start, beside=fill_channels(flux, known, hole), put_back=put_back if paste_back else None)


def fill_channels(flux: Flux, known: Tensor, hole: Tensor) -> Tensor:
    """What each image token is told of pictures (n, 3, H, W) in [-1, 1] and holes (n, 1, H, W), 1 to fill: (n, N, 64 + 256)."""
    # Note: the hole is grey (0 in [-1, 1]). Of the mask a latent pixel gets all its 8x8 pixels as channels, row by row.
    z, m = encode(flux, known * (1 - hole)), F.pixel_unshuffle(hole, 8)         # (n, 16, h, w), (n, 64, h, w)
    return torch.cat([patchify(z), patchify(m.to(z))], dim=-1)


def main() -> None:
    from . import cli

    parser = cli.parser("fill", "Fill the white part of a mask after a prompt.")
    cli.add_image_and_mask(parser, expand=True)
    parser.add_argument("--paste-back", action="store_true", help="keep every pixel outside the mask exactly (default: off)")
    cli.add_strength(parser, 1.0)
    cli.run(parser, fill, cli.image_and_mask)


if __name__ == "__main__":
    main()
