"""Kontext: change a picture by an instruction (FLUX.1 Kontext, arXiv:2506.15742).

    python -m miniflux.kontext_edit "make the sky purple" --model kontext --image photo.png

The picture's tokens follow those to be painted, with a position of their own: index 1 instead of 0, rows and columns from 0. The
model sees them, paints the others, and learns from the instruction what to keep. The seam: what enters the transformer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapters.ip_adapter import IPImage, IPScale, read_ip_images
from .checks import check_number, check_switch
from .flux import Flux
from .generate import paint
from .images import (
    MAX_SIDE,
    Picture,
    Pictures,
    check_side,
    fit,
    floor_side,
    natural_size,
    read_pictures,
    size_of,
)
from .latents import encode
from .prompt import Text
from .sampling import OnFinish, OnStep, image_ids, patchify
from .settings import check_model, resolve

# Width x height of about a megapixel: what Kontext was trained on.
PREFERRED = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
             (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672))


@torch.no_grad()
def kontext_edit(flux: Flux, prompt: Text, image: Picture | list[Picture], *, auto_resize: bool = True, max_area: int | None = None,
                 width: int | None = None, height: int | None = None, steps: int | None = None, guidance: float | None = None,
                 seed: int = 0, num_images: int = 1, negative_prompt: Text | None = None, true_cfg: float = 1.0,
                 sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None, ip_image: IPImage | None = None,
                 ip_scale: IPScale = 1.0, negative_ip_image: IPImage | None = None, output: str = "pil", progress: bool = True,
                 on_step: OnStep | None = None, on_finish: OnFinish | None = None) -> Pictures:
    """Change a picture by an instruction.

    image: one (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list, one for each prompt. auto_resize: the model sees it in
    the nearest of the 17 shapes that it was trained on; else in its own size, rounded down to multiples of 16. width, height:
    exactly the size to paint, by default that of the picture as the model sees it. max_area: scale the size to so many pixels,
    in the same shape (diffusers does so with 1024 x 1024, whatever the size). guidance: default 3.5. The other keywords are
    those of `generate`.

    Raises ValueError or FileNotFoundError for what is no picture, and for a value out of range.
    Reference: diffusers' `FluxKontextPipeline`; for the size, `src/flux/cli_kontext.py` of the original repository."""
    pictures = read_pictures(image, "image")
    seen = seen_size(flux, size_of(pictures[0]), auto_resize)
    width, height = painted_size(seen, width, height, max_area)
    call = resolve("kontext_edit", flux, width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg, sigmas,
                   max_text_tokens, output, progress, on_step, on_finish)
    return paint(flux, prompt, call, after=reference(encode(flux, fit(pictures, *seen))),
                 ip=read_ip_images(flux, ip_image, ip_scale, negative_ip_image))


def seen_size(flux: Flux, size: tuple[int, int], auto_resize: bool) -> tuple[int, int]:
    """The (width, height) at which a model looks at a picture of that size; for a small model all shapes are smaller."""
    check_model(flux)
    width, height = floor_side(size[0]), floor_side(size[1])
    if not check_switch("auto_resize", auto_resize):
        return width, height
    # Note: the nearest shape to the rounded size, as diffusers has it, not to the picture's own.
    _, width, height = min((abs(width / height - w / h), w, h) for w, h in PREFERRED)
    return floor_side(width * flux.config.size / 1024), floor_side(height * flux.config.size / 1024)


def painted_size(seen: tuple[int, int], width: int | None, height: int | None, max_area: int | None = None) -> tuple[int, int]:
    """The size to paint: as asked for, else as seen; scaled to max_area pixels if that is given."""
    width = None if width is None else check_side("width", width)
    height = None if height is None else check_side("height", height)
    size = seen if width is None and height is None else natural_size(seen, 0, width, height)
    if max_area is None:
        return size
    return natural_size(size, check_number("max_area", max_area, 16 * 16, MAX_SIDE ** 2, whole=True))


def reference(z: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (n, 16, h, w) of what is to be seen, as tokens (n, M, 64) with their positions (1, row, column)."""
    return patchify(z), image_ids(*z.shape[2:], index=1)


def main() -> None:
    from . import cli

    parser = cli.parser("kontext_edit", "Change a picture by an instruction.")
    parser.add_argument("--image", required=True, help="the picture to change (required)")
    cli.add_auto_resize(parser)
    parser.add_argument("--max-area", type=int, help="scale the size to so many pixels (default: the size as it is)")
    cli.add_ip_images(parser)
    cli.run(parser, kontext_edit)


if __name__ == "__main__":
    main()
