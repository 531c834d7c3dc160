"""Redux: variations of a picture (FLUX.1 Redux). The picture becomes text tokens: it is read, not copied.

    python -m miniflux.redux --image robot.webp --model redux
    python -m miniflux.redux --image fox.png owl.png --scales 0.7 0.3 --prompt "at night" --model redux

SigLIP's patch tokens go through a small embedder into the width of T5's tokens and are appended to the prompt's. The seam: what
enters the transformer. `redux_prompt` returns the result as a `Prompt`, which every other task accepts too.
"""

from collections.abc import Sequence

import torch
from typing_extensions import Unpack

from .checks import check_number, to_number
from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import BICUBIC, ImageLike, Images, preprocess, read_each
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
def redux_prompt(flux: Flux, image: ImageLike | list[ImageLike], *, prompt: str | Prompt | None = "",
                 scales: float | Sequence[float] | None = None, pooled_scales: float | Sequence[float] | None = None,
                 max_text_tokens: int | None = None) -> Prompt:
    """The one prompt that n pictures and a text make: txt (1, L + N, ·), the text's tokens and then the images', and pooled (1, ·).

    image: one picture or a list, of any sizes. prompt: a text; None for zeros in its place. scales: the weight of each picture,
    together with the text; several pictures are summed, so the weights should add up to about 1 (default: 1/n each).
    pooled_scales: the same for pooled (default: as scales).

    Raises ValueError or FileNotFoundError for what is no picture, or a model without Redux."""
    check_model(flux)
    if flux.siglip is None or flux.redux is None:
        raise ValueError(f'the model {flux.config.name} has no Redux: load("redux"), or add it with add_redux(flux, source)')
    pictures = read_each(image, "image")
    size, weight = flux.siglip.config.image_size, next(flux.siglip.parameters())
    tokens = flux.redux(flux.siglip(preprocess(pictures, size, size, BICUBIC).to(weight)))  # (n, N, context_in_dim)
    text = encode_prompt(flux, prompt, max_text_tokens) if prompt is not None else no_text(flux, max_text_tokens)
    if len(text) > 1:
        raise ValueError(f"redux takes one prompt for all its pictures, got {len(text)}: call once for each")
    txt_scales = weights("scales", 1 / len(pictures) if scales is None else scales, len(pictures)).to(tokens)
    vec_scales = txt_scales if pooled_scales is None else weights("pooled_scales", pooled_scales, len(pictures)).to(tokens)
    txt = torch.cat([text.txt.expand(len(pictures), -1, -1).to(tokens), tokens], dim=1)  # (n, L + N, context_in_dim)
    return to_model(Prompt((txt_scales[:, None, None] * txt).sum(0, keepdim=True),
                       (vec_scales[:, None] * text.pooled.to(tokens)).sum(0, keepdim=True)), flux)


def no_text(flux: Flux, max_text_tokens: int | None) -> Prompt:
    """Zeros in the place of a text, as diffusers has it where no text encoders are loaded."""
    sizes = flux.mmdit.config
    return Prompt(torch.zeros(1, text_length(flux, max_text_tokens), sizes.context_in_dim), torch.zeros(1, sizes.vec_in_dim))


def weights(name: str, values: float | Sequence[float], count: int) -> torch.Tensor:
    """One number for each picture: (count,)."""
    values = [values] * count if to_number(values) is not None else list(values)
    if len(values) != count:
        raise ValueError(f"there are {len(values)} {name} for {count} pictures: give one number, or one for each")
    return torch.tensor([check_number(f"each of the {name}", value, -100, 100) for value in values], dtype=torch.float32)


@command
def main() -> None:
    from . import cli

    parser = cli.parser("redux", "Paint variations of a picture.", prompt=False)
    parser.add_argument("--image", nargs="+", required=True, help="the picture, or several to be mixed (required)")
    parser.add_argument("--prompt", default="", help="a text beside the picture (default: none)")
    parser.add_argument("--scales", type=float, nargs="+", help="the weight of each picture (default: all alike, 1 in sum)")
    cli.run(parser, redux)


if __name__ == "__main__":
    main()
