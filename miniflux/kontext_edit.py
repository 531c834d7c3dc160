"""Kontext: change an image by an instruction (FLUX.1 Kontext, arXiv:2506.15742).

    python -m miniflux.kontext_edit "make the sky purple" --model kontext --image photo.png

The image's tokens follow those to be painted, with positions of their own: index 1 instead of 0,
rows and columns from 0. The model attends to them, paints the others, and takes from the
instruction what to keep. The seam: what enters the transformer.
"""

from torch import Tensor
from typing_extensions import Unpack

from .checks import check_number, check_switch
from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import MAX_SIDE, Images, check_side, floor_side, natural_size, preprocess
from .imaging.reading import ImageLike, read_images, size_of
from .latents import encode
from .prompt import PromptLike
from .sampling import Conditions, image_ids, patchify
from .settings import IPSettings, check_model, resolve, task

# Width x height of about a megapixel: what Kontext was trained on.
PREFERRED = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184),
    (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752),
    (1456, 720), (1504, 688), (1568, 672),
)


@task
def kontext_edit(flux: Flux, prompt: PromptLike, image: ImageLike | list[ImageLike], *,
                 auto_resize: bool = True, max_area: int | None = None,
                 **settings: Unpack[IPSettings]) -> Images:
    """Change an image by an instruction.

    prompt: the instruction, such as "make the sky purple".
    image: one (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list, one for each prompt.
    auto_resize: give the model the image in the nearest of the 17 shapes that it was trained on;
        else in its own size, rounded down to multiples of 16.
    max_area: scale the size to so many pixels, in the same shape; default: leave it (diffusers
        scales to 1024 x 1024 pixels).

    width and height are by default those of the image as the model is given it.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError or FileNotFoundError for what is no image, and for a value out of range.
    Reference: diffusers' `FluxKontextPipeline`; for the size, `src/flux/cli_kontext.py` of the
    original repository."""
    images = read_images(image, "image")
    size = reference_size(flux, size_of(images[0]), auto_resize)
    call = resolve("kontext_edit", flux, with_output_size(settings, size, max_area))
    return sample(flux, prompt, call, reference_tokens(encode(flux, preprocess(images, *size))))


def reference_size(flux: Flux, size: tuple[int, int], auto_resize: bool) -> tuple[int, int]:
    """The (width, height) at which the model is given an image of that size.

    For a small model all shapes are smaller."""
    check_model(flux)
    width, height = floor_side(size[0]), floor_side(size[1])
    if not check_switch("auto_resize", auto_resize):
        return width, height
    # Note: the shape nearest to the rounded size, as in diffusers, not to the image's own.
    _, width, height = min((abs(width / height - w / h), w, h) for w, h in PREFERRED)
    scale = flux.config.size / 1024
    return floor_side(width * scale), floor_side(height * scale)


def with_output_size(settings: IPSettings, size: tuple[int, int], max_area: int | None = None
                     ) -> IPSettings:
    """The settings with the width and height to paint: as given, else `size`; scaled to max_area
    pixels if that is given."""
    width, height = settings.get("width"), settings.get("height")
    if width is not None:
        width = check_side("width", width)
    if height is not None:
        height = check_side("height", height)
    if width or height:
        size = natural_size(size, 0, width, height)
    if max_area is not None:
        max_area = check_number("max_area", max_area, 16 * 16, MAX_SIDE ** 2, whole=True)
        size = natural_size(size, max_area)
    return {**settings, "width": size[0], "height": size[1]}


def reference_tokens(z: Tensor) -> Conditions:
    """Latents (n, 16, h, w) of a reference as further tokens (n, M, 64) at (1, row, column)."""
    return Conditions(img_cond_seq=patchify(z), img_cond_seq_ids=image_ids(*z.shape[2:], index=1))


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("kontext_edit", "Change a picture by an instruction.")
    parser.add_argument("--image", required=True, help="the picture to change (required)")
    flags.add_auto_resize(parser)
    parser.add_argument("--max-area", type=int,
                        help="scale the size to so many pixels (default: the size as it is)")
    flags.add_ip_images(parser)
    cli.run(parser, kontext_edit)


if __name__ == "__main__":
    main()
