"""Inpainting with any model: repaint what a mask shows, keep the rest.

    python -m miniflux.inpaint "a fox" --image photo.png --mask mask.png --strength 0.9

As `image_to_image`, but where the mask is black the velocity is replaced by that of the straight
line from the noise to the image's own latents, so that the known part arrives where it was. The
seam: another velocity.
"""

from dataclasses import replace

from typing_extensions import Unpack

from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import Images, preprocess
from .imaging.masks import around_mask, fit_masks, latent_mask, read_masks
from .imaging.reading import ImageLike, read_images, size_of
from .latents import encode
from .prompt import PromptLike
from .settings import AdapterSettings, resolve, task


@task
def inpaint(flux: Flux, prompt: PromptLike, image: ImageLike | list[ImageLike],
            mask: ImageLike | list[ImageLike], *, strength: float = 0.6,
            mask_padding: int | None = None, **settings: Unpack[AdapterSettings]) -> Images:
    """Repaint the white part of a mask after a prompt; the rest keeps its latents.

    image: as in `image_to_image`.
    mask: likewise, grey, cut at one half.
    strength: in (0, 1], as in `image_to_image`.
    mask_padding: paint only the region around the mask, so many pixels wider on each side, at the
        full width x height, and paste it back: the result has the image's own size. Control images
        are cropped like it. Default: the whole image.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError or FileNotFoundError for what is no image, an empty mask, or a value out of
    range.
    Reference: diffusers' `FluxInpaintPipeline` and `FluxControlNetInpaintPipeline`, with the mean
    of the autoencoder's posterior."""
    images = read_images(image, "image")
    call = resolve("inpaint", flux, settings, like=size_of(images[0]), strength=strength)
    masks = read_masks(mask, images)
    paste_back = None
    if mask_padding is not None:
        crop, paste_back = around_mask(images, masks, call.width, call.height, mask_padding)
        images, masks = [crop(images[0])], [crop(masks[0])]
        controls = []
        for control in call.controls:
            controls.append(control._replace(image=[crop(image) for image in control.image]))
        call = replace(call, controls=controls)
    hole = fit_masks(masks, call.width, call.height)                            # (n, 1, H, W)
    start = encode(flux, preprocess(images, call.width, call.height))           # (n, 16, h, w)
    return sample(flux, prompt, call, start=start, mask=latent_mask(hole), composite=paste_back)


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("inpaint", "Repaint the white part of a mask after a prompt.")
    flags.add_image_and_mask(parser)
    flags.add_strength(parser, 0.6)
    flags.add_controls(parser)
    flags.add_ip_images(parser)
    cli.run(parser, inpaint, cli.image_and_mask)


if __name__ == "__main__":
    main()
