"""Fill: repaint what a mask shows, with the model that was made for it (FLUX.1 Fill), inside an
image or beyond its edges.

    python -m miniflux.fill "a white cup" --model fill --image table.png --mask mask.png
    python -m miniflux.fill "a wide meadow" --model fill --image fox.png --expand 256 0 256 0

Each token carries, beside its 64 latent channels, 64 of the image with a grey hole and 256 of the
mask: 384 in all. The model keeps the known part by itself. The seam: what enters the transformer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from .checks import check_switch
from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import Images, preprocess, to_tensor
from .imaging.masks import feather, fit_masks, paste, read_masks
from .imaging.reading import ImageLike, read_images, size_of
from .latents import encode
from .prompt import PromptLike
from .sampling import Conditions, patchify
from .settings import Settings, resolve, task


@task
def fill(flux: Flux, prompt: PromptLike, image: ImageLike | list[ImageLike],
         mask: ImageLike | list[ImageLike], *, paste_back: bool = False, strength: float = 1.0,
         **settings: Unpack[Settings]) -> Images:
    """Fill the white part of a mask after a prompt.

    image: one (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list, one for each prompt.
    mask: likewise, grey, cut at one half.
    paste_back: keep every pixel outside the mask exactly, with a soft seam inside it; the result
        then has the image's own size, unless width or height is given.
    strength: in (0, 1]; below 1, begin from the image itself.

    steps is 50 and guidance 30 by default.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError or FileNotFoundError for what is no image, an empty mask, a model without the
    384 channels, or a value out of range.
    Reference: diffusers' `FluxFillPipeline`, with the mean of the autoencoder's posterior."""
    images = read_images(image, "image")
    call = resolve("fill", flux, settings, like=size_of(images[0]), strength=strength)
    paste_back = check_switch("paste_back", paste_back)
    masks = read_masks(mask, images)
    known = preprocess(images, call.width, call.height)                         # (n, 3, H, W)
    hole = fit_masks(masks, call.width, call.height)                            # (n, 1, H, W)
    from_noise = call.strength == 1 and call.sigmas is None                     # t = 1: pure noise
    own_size = settings.get("width") is None and settings.get("height") is None

    def composite(filled: Tensor) -> Tensor:
        size = size_of(images[0]) if own_size else (call.width, call.height)
        whole = torch.cat([to_tensor(image, *size) for image in images])        # (n, 3, H, W)
        return paste(filled, whole, feather(fit_masks(masks, *size)))

    return sample(flux, prompt, call, Conditions(img_cond=fill_channels(flux, known, hole)),
                  start=None if from_noise else encode(flux, known),
                  composite=composite if paste_back else None)


def fill_channels(flux: Flux, known: Tensor, hole: Tensor) -> Tensor:
    """The channels that each image token carries beside its own latents.

    known: images (n, 3, H, W) in [-1, 1]. hole: (n, 1, H, W), 1 where they are to be filled.
    Returns (n, N, 64 + 256)."""
    # Note: the hole is grey: 0 in [-1, 1].
    z = encode(flux, known * (1 - hole))                                        # (n, 16, h, w)
    # Note: of the mask a latent pixel gets all its 8x8 pixels as channels, row by row.
    m = F.pixel_unshuffle(hole, 8)                                              # (n, 64, h, w)
    return torch.cat([patchify(z), patchify(m.to(z))], dim=-1)


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("fill", "Fill the white part of a mask after a prompt.")
    flags.add_image_and_mask(parser, expand=True)
    parser.add_argument("--paste-back", action="store_true",
                        help="keep every pixel outside the mask exactly (default: off)")
    flags.add_strength(parser, 1.0)
    cli.run(parser, fill, cli.image_and_mask)


if __name__ == "__main__":
    main()
