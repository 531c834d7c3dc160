"""Inpainting with any model: repaint what a mask shows, keep the rest.

    python -m miniflux.inpaint "a fox" --image photo.png --mask mask.png --strength 0.9

As `image_to_image`, but where the mask is black the velocity is replaced by that of the straight line from the noise to the
picture's own latents, so that the kept part arrives where it was. The seam: another velocity.
"""

from collections.abc import Sequence

import torch

from .flux import Flux
from .generate import paint
from .images import Picture, Pictures, fit, read_pictures, size_of
from .latents import encode
from .masks import around_mask, fit_masks, latent_mask, read_masks
from .prompt import Text
from .sampling import OnStep
from .settings import resolve


@torch.inference_mode()
def inpaint(flux: Flux, prompt: Text, image: Picture | list[Picture], mask: Picture | list[Picture], *, strength: float = 0.6,
            mask_padding: int | None = None, width: int | None = None, height: int | None = None, steps: int | None = None,
            guidance: float | None = None, seed: int = 0, num_images: int = 1, negative_prompt: Text | None = None,
            true_cfg: float = 1.0, sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None,
            output: str = "pil", progress: bool = True, on_step: OnStep | None = None) -> Pictures:
    """Repaint the white part of a mask after a prompt; the rest keeps its latents.

    image, mask: as in `image_to_image`; the mask is grey and cut at one half. strength: in (0, 1], as there. mask_padding: paint
    only the region around the mask, so many pixels wider on each side, at the full width x height, and paste it back: the
    result has the picture's own size. guidance: default 7. The other keywords are those of `generate`.

    Raises ValueError or FileNotFoundError for what is no picture, an empty mask, or a value out of range.
    Reference: diffusers' `FluxInpaintPipeline`, with the mean of the autoencoder's posterior."""
    pictures = read_pictures(image, "image")
    call = resolve("inpaint", flux, width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg, sigmas,
                   max_text_tokens, output, progress, on_step, like=size_of(pictures[0]), strength=strength)
    masks, put_back = read_masks(mask, pictures), None
    if mask_padding is not None:
        pictures, masks, put_back = around_mask(pictures, masks, call.width, call.height, mask_padding)
    hole = fit_masks(masks, call.width, call.height)                            # (n, 1, H, W)
    z = encode(flux, fit(pictures, call.width, call.height))                    # (n, 16, h, w)
    return paint(flux, prompt, call, start=z, mask=latent_mask(hole), put_back=put_back)


def main() -> None:
    from . import cli

    parser = cli.parser("inpaint", "Repaint the white part of a mask after a prompt.")
    cli.add_image_and_mask(parser)
    cli.add_strength(parser, 0.6)
    cli.run(parser, inpaint, cli.image_and_mask)


if __name__ == "__main__":
    main()
