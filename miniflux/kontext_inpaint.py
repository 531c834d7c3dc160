"""Kontext inpainting: repaint what a mask shows, by an instruction or after a reference picture.

    python -m miniflux.kontext_inpaint "a red hat" --model kontext --image photo.png --mask mask.png
    python -m miniflux.kontext_inpaint "this cup" --model kontext --image table.png --mask mask.png --reference cup.png

As `inpaint`, and the model sees the picture itself, or the reference, as `kontext_edit` does. The seams: what enters the
transformer, the start, and the velocity.
"""

from collections.abc import Sequence

import torch

from .adapters.ip_adapter import IPImage, IPScale, read_ip_images
from .flux import Flux
from .generate import paint
from .images import Picture, Pictures, fit, read_pictures, size_of
from .kontext_edit import painted_size, seen_size
from .kontext_edit import reference as seen_beside
from .latents import encode
from .masks import around_mask, fit_masks, latent_mask, read_masks
from .prompt import Text
from .sampling import OnFinish, OnStep
from .settings import resolve


@torch.no_grad()
def kontext_inpaint(flux: Flux, prompt: Text, image: Picture | list[Picture], mask: Picture | list[Picture], *,
                    reference: Picture | list[Picture] | None = None, strength: float = 1.0, mask_padding: int | None = None,
                    auto_resize: bool = True, width: int | None = None, height: int | None = None, steps: int | None = None,
                    guidance: float | None = None, seed: int = 0, num_images: int = 1, negative_prompt: Text | None = None,
                    true_cfg: float = 1.0, sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None,
                    ip_image: IPImage | None = None, ip_scale: IPScale = 1.0, negative_ip_image: IPImage | None = None,
                    output: str = "pil", progress: bool = True, on_step: OnStep | None = None,
                    on_finish: OnFinish | None = None) -> Pictures:
    """Repaint the white part of a mask by an instruction, or after a reference picture.

    image, mask, strength, mask_padding: as in `inpaint` (strength 1 by default). reference: a picture of what is to be painted;
    without it the model sees the image itself. auto_resize: image and reference are seen in the nearest of the 17 shapes that
    Kontext was trained on. width, height: by default the image's, as it is seen. guidance: default 3.5. The other keywords are
    those of `generate`.

    Raises ValueError or FileNotFoundError for what is no picture, an empty mask, or a value out of range.
    Reference: diffusers' `FluxKontextInpaintPipeline`; what it does with mask_padding differs in two points: here the region
    is cut out of the picture's own pixels and pasted back, and the reference stays whole."""
    pictures = read_pictures(image, "image")
    width, height = painted_size(seen_size(flux, size_of(pictures[0]), auto_resize), width, height)
    call = resolve("kontext_inpaint", flux, width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg, sigmas,
                   max_text_tokens, output, progress, on_step, on_finish, strength=strength)
    masks, put_back, size = read_masks(mask, pictures), None, (call.width, call.height)
    if mask_padding is not None:
        near, put_back = around_mask(pictures, masks, *size, mask_padding)
        pictures, masks = [near(pictures[0])], [near(masks[0])]
    repaint, z = latent_mask(fit_masks(masks, *size)), encode(flux, fit(pictures, *size))  # (n, 1, h, w), (n, 16, h, w)
    seen = z
    if reference is not None:
        others = read_pictures(reference, "reference")
        seen = encode(flux, fit(others, *seen_size(flux, size_of(others[0]), auto_resize)))
    return paint(flux, prompt, call, start=z, mask=repaint, after=seen_beside(seen), put_back=put_back,
                 ip=read_ip_images(flux, ip_image, ip_scale, negative_ip_image))


def main() -> None:
    from . import cli

    parser = cli.parser("kontext_inpaint", "Repaint the white part of a mask by an instruction, or after a reference picture.")
    cli.add_image_and_mask(parser)
    parser.add_argument("--reference", help="a picture of what is to be painted (default: the image itself)")
    cli.add_strength(parser, 1.0)
    cli.add_auto_resize(parser)
    cli.add_ip_images(parser)
    cli.run(parser, kontext_inpaint, cli.image_and_mask)


if __name__ == "__main__":
    main()
