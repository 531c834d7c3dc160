"""Redux: variations of an image (FLUX.1 Redux). The image becomes text tokens.

    python -m miniflux.redux --image robot.webp --model redux
    python -m miniflux.redux --image fox.png owl.png --scales 0.7 0.3 --prompt "at night" \
        --model redux

A small embedder maps SigLIP's patch tokens to the width of T5's tokens; they are appended to those
of the prompt. The seam: what enters the transformer. `redux_prompt` returns the result as a
`Prompt`, which every other task accepts too.
"""

from collections.abc import Sequence

import torch
from typing_extensions import Unpack

from .checks import check_number, to_number
from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import BICUBIC, Images, preprocess
from .imaging.reading import ImageLike, read_each
from .prompt import Prompt, encode_prompt, text_length, to_model
from .settings import Settings, check_model, resolve, task


@task
def redux(flux: Flux, image: ImageLike | list[ImageLike], *, prompt: str | Prompt | None = "",
          scales: float | Sequence[float] | None = None, **settings: Unpack[Settings]) -> Images:
    """Paint variations of an image, or of a mixture of several.

    image, prompt, scales: see `redux_prompt`.

    The makers of the model recommend guidance 2.5 and 50 steps.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError for a model without Redux: `load("redux")`, or `add_redux`.
    Reference: diffusers' `FluxPriorReduxPipeline`, followed by its `FluxPipeline`."""
    call = resolve("redux", flux, settings)
    mixed = redux_prompt(flux, image, prompt=prompt, scales=scales,
                         max_text_tokens=call.max_text_tokens)
    return sample(flux, mixed, call)


@torch.no_grad()
def redux_prompt(flux: Flux, image: ImageLike | list[ImageLike], *,
                 prompt: str | Prompt | None = "",
                 scales: float | Sequence[float] | None = None,
                 pooled_scales: float | Sequence[float] | None = None,
                 max_text_tokens: int | None = None) -> Prompt:
    """The one prompt that n images and a text make together.

    image: one image or a list, of any sizes.
    prompt: a text, or None for zeros in its place; default: the empty text.
    scales: the weight of each image, together with the text; the weighted tokens are summed, so the
        weights should add up to about 1; default: 1/n each.
    pooled_scales: the same for the pooled vector; default: as scales.
    max_text_tokens: T5 tokens that the text is padded to; default: the model's.

    Returns a Prompt with txt (1, L + N, context_in_dim), the text's tokens and then the images',
    and pooled (1, vec_in_dim).
    Raises ValueError or FileNotFoundError for what is no image, or a model without Redux."""
    check_model(flux)
    if flux.siglip is None or flux.redux is None:
        raise ValueError(f'the model {flux.config.name} has no Redux: load("redux"), or add it '
                         "with add_redux(flux, source)")
    images = read_each(image, "image")
    n = len(images)
    size = flux.siglip.config.image_size
    pixels = preprocess(images, size, size, BICUBIC).to(next(flux.siglip.parameters()))
    tokens = flux.redux(flux.siglip(pixels))                                    # (n, N, ·)
    if prompt is None:
        text = no_text(flux, max_text_tokens)
    else:
        text = encode_prompt(flux, prompt, max_text_tokens)
    if len(text) > 1:
        raise ValueError(f"redux takes one prompt for all its images, got {len(text)}: call once "
                         "for each")

    txt_scales = weights("scales", 1 / n if scales is None else scales, n).to(tokens)
    scales = txt_scales
    if pooled_scales is not None:
        scales = weights("pooled_scales", pooled_scales, n).to(tokens)
    txt = torch.cat([text.txt.expand(n, -1, -1).to(tokens), tokens], dim=1)     # (n, L+N, ·)
    txt = (txt_scales[:, None, None] * txt).sum(0, keepdim=True)                # (1, L+N, ·)
    pooled = (scales[:, None] * text.pooled.to(tokens)).sum(0, keepdim=True)    # (1, vec_in_dim)
    return to_model(Prompt(txt, pooled), flux)


def no_text(flux: Flux, max_text_tokens: int | None) -> Prompt:
    """Zeros in the place of a text, as in diffusers where no text encoders are loaded."""
    sizes = flux.mmdit.config
    txt = torch.zeros(1, text_length(flux, max_text_tokens), sizes.context_in_dim)
    return Prompt(txt, torch.zeros(1, sizes.vec_in_dim))


def weights(name: str, values: float | Sequence[float], count: int) -> torch.Tensor:
    """One weight for each image: (count,)."""
    values = [values] * count if to_number(values) is not None else list(values)
    if len(values) != count:
        raise ValueError(f"there are {len(values)} {name} for {count} images: give one number, or "
                         "one for each")
    return torch.tensor([check_number(f"each of the {name}", each, -100, 100) for each in values],
                        dtype=torch.float32)


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("redux", "Paint variations of an image.", prompt=False)
    parser.add_argument("--image", nargs="+", required=True,
                        help="the image, or several to be mixed (required)")
    parser.add_argument("--prompt", default="", help="a text beside the image (default: none)")
    parser.add_argument("--scales", type=float, nargs="+",
                        help="the weight of each image (default: all alike, 1 in sum)")
    cli.run(parser, redux)


if __name__ == "__main__":
    main()
