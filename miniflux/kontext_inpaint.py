"""Kontext inpainting: repaint what a mask shows, by an instruction or after a reference image.

    python -m miniflux.kontext_inpaint "a red hat" --model kontext --image a.png --mask mask.png
    python -m miniflux.kontext_inpaint "this cup" --model kontext --image a.png --mask mask.png \
        --reference cup.png

As `inpaint`, and the model attends to the image itself, or to the reference, as in `kontext_edit`.
The seams: what enters the transformer, the start, and the velocity.
"""

from typing_extensions import Unpack

from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import Images, preprocess
from .imaging.masks import around_mask, fit_masks, latent_mask, read_masks
from .imaging.reading import ImageLike, read_images, size_of
from .kontext_edit import reference_size, reference_tokens, with_output_size
from .latents import encode
from .prompt import PromptLike
from .settings import IPSettings, resolve, task


@task
def kontext_inpaint(flux: Flux, prompt: PromptLike, image: ImageLike | list[ImageLike],
                    mask: ImageLike | list[ImageLike], *,
                    reference: ImageLike | list[ImageLike] | None = None, strength: float = 1.0,
                    mask_padding: int | None = None, auto_resize: bool = True,
                    **settings: Unpack[IPSettings]) -> Images:
    """Repaint the white part of a mask by an instruction, or after a reference image.

    image, mask, strength, mask_padding: as in `inpaint` (strength 1 by default).
    reference: an image of what is to be painted; default: the image itself.
    auto_resize: image and reference are given to the model in the nearest of the 17 shapes that
        Kontext was trained on.

    width and height are by default the image's, as the model is given it.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError or FileNotFoundError for what is no image, an empty mask, or a value out of
    range.
    Reference: diffusers' `FluxKontextInpaintPipeline`. Two things differ with mask_padding: here
    the region is cropped from the image's own pixels and pasted back, and the reference stays
    whole."""
    images = read_images(image, "image")
    size = reference_size(flux, size_of(images[0]), auto_resize)
    call = resolve("kontext_inpaint", flux, with_output_size(settings, size), strength=strength)
    masks = read_masks(mask, images)
    paste_back = None
    if mask_padding is not None:
        crop, paste_back = around_mask(images, masks, call.width, call.height, mask_padding)
        images, masks = [crop(images[0])], [crop(masks[0])]
    hole = latent_mask(fit_masks(masks, call.width, call.height))               # (n, 1, h, w)
    start = encode(flux, preprocess(images, call.width, call.height))           # (n, 16, h, w)
    seen = start
    if reference is not None:
        references = read_images(reference, "reference")
        size = reference_size(flux, size_of(references[0]), auto_resize)
        seen = encode(flux, preprocess(references, *size))
    return sample(flux, prompt, call, reference_tokens(seen), start=start, mask=hole,
                  composite=paste_back)


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("kontext_inpaint", "Repaint the white part of a mask by an instruction, "
                                             "or after a reference image.")
    flags.add_image_and_mask(parser)
    parser.add_argument("--reference",
                        help="an image of what is to be painted (default: the image itself)")
    flags.add_strength(parser, 1.0)
    flags.add_auto_resize(parser)
    flags.add_ip_images(parser)
    cli.run(parser, kontext_inpaint, cli.image_and_mask)


if __name__ == "__main__":
    main()
