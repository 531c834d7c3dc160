"""Inpainting with any model: repaint what a mask shows, keep the rest.

    python -m miniflux.inpaint "a fox" --image photo.png --mask mask.png --strength 0.9

As `image_to_image`, but where the mask is black the velocity is replaced by that of the straight line from the noise to the
picture's own latents, so that the kept part arrives where it was. The seam: another velocity.
"""

from collections.abc import Sequence

import torch

from .adapters.ip_adapter import IPImage, IPScale, read_ip_images
from .controlnet import Controls, read_controls
from .flux import Flux
from .generate import paint
from .images import Picture, Pictures, fit, read_pictures, size_of
from .latents import encode
from .masks import around_mask, fit_masks, latent_mask, read_masks
from .prompt import Text
from .sampling import OnFinish, OnStep
from .settings import resolve


@torch.no_grad()
def inpaint(flux: Flux, prompt: Text, image: Picture | list[Picture], mask: Picture | list[Picture], *, strength: float = 0.6,
            mask_padding: int | None = None, width: int | None = None, height: int | None = None, steps: int | None = None,
            guidance: float | None = None, seed: int = 0, num_images: int = 1, negative_prompt: Text | None = None,
            true_cfg: float = 1.0, sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None,
            controlnet: Controls | None = None, ip_image: IPImage | None = None, ip_scale: IPScale = 1.0,
            negative_ip_image: IPImage | None = None, output: str = "pil", progress: bool = True, on_step: OnStep | None = None,
            on_finish: OnFinish | None = None) -> Pictures:
    """Repaint the white part of a mask after a prompt; the rest keeps its latents.

    image, mask: as in `image_to_image`; the mask is grey and cut at one half. strength: in (0, 1], as there. mask_padding: paint
    only the region around the mask, so many pixels wider on each side, at the full width x height, and paste it back: the
    result has the picture's own size; control pictures are cut like it. guidance: default 7. The other keywords are those of `generate`.

    Raises ValueError or FileNotFoundError for what is no picture, an empty mask, or a value out of range.
    Reference: diffusers' `FluxInpaintPipeline` and `FluxControlNetInpaintPipeline`, with the mean of the autoencoder's posterior."""
    pictures, controls = read_pictures(image, "image"), read_controls(flux, controlnet)
    call = resolve("inpaint", flux, width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg, sigmas,
                   max_text_tokens, output, progress, on_step, on_finish, like=size_of(pictures[0]), strength=strength)
    masks, put_back = read_masks(mask, pictures), None
    if mask_padding is not None:
        near, put_back = around_mask(pictures, masks, call.width, call.height, mask_padding)
        pictures, masks = [near(pictures[0])], [near(masks[0])]
        controls = [control._replace(image=[near(picture) for picture in control.image]) for control in controls]
    hole = fit_masks(masks, call.width, call.height)                            # (n, 1, H, W)
    z = encode(flux, fit(pictures, call.width, call.height))                    # (n, 16, h, w)
    return paint(flux, prompt, call, start=z, mask=latent_mask(hole), put_back=put_back, controls=controls,
                 ip=read_ip_images(flux, ip_image, ip_scale, negative_ip_image))


def main() -> None:
    from . import cli

    parser = cli.parser("inpaint", "Repaint the white part of a mask after a prompt.")
    cli.add_image_and_mask(parser)
    cli.add_strength(parser, 0.6)
    cli.add_controls(parser)
    cli.add_ip_images(parser)
    cli.run(parser, inpaint, cli.image_and_mask)


if __name__ == "__main__":
    main()
