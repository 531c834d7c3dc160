"""Text to image.

    python -m miniflux.generate "a fox next to a red apple" --seed 7 --output fox.png

The function below is FLUX.1's whole algorithm; every other task differs from it in what enters the transformer, or in
what becomes of the velocity it returns.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from .flux import Flux
from .prompt import Prompt, encode_prompt, match, repeat
from .sampling import (
    classifier_free,
    euler,
    flow,
    image_ids,
    noise,
    patchify,
    schedule,
    unpatchify,
)
from .settings import finish, resolve


@torch.inference_mode()
def generate(flux: Flux, prompt: str | list[str] | Prompt, *, width: int | None = None, height: int | None = None,
             steps: int | None = None, guidance: float | None = None, seed: int = 0, num_images: int = 1,
             negative_prompt: str | list[str] | Prompt | None = None, true_cfg: float = 1.0, sigmas: Sequence[float] | None = None,
             max_text_tokens: int | None = None, output: str = "pil", progress: bool = True,
             on_step: Callable[[int, float, Tensor], None] | None = None) -> list[Image.Image] | Tensor:
    """Paint pictures from text.

    prompt: a string, a list of strings or an encoded `Prompt`; `num_images` pictures of each, side by side.
    width, height: pixels, rounded down to multiples of 16 (default: the model's). steps: default 28, or 4 for a model
    without guidance (schnell). guidance: default 3.5. seed: picture i of the call is painted from seed + i.
    negative_prompt, true_cfg: with both, two passes a step and v_neg + true_cfg · (v - v_neg). sigmas: own falling times in
    (0, 1], before the shift; their number is the number of steps. max_text_tokens: T5 tokens (default: the model's).
    output: "pil" (a list), "tensor" (B, 3, H, W) in [0, 1], or "latents" (B, 16, H/8, W/8).
    on_step(step, t, x): called before each step with its number, its time and the latents (B, 16, H/8, W/8) at that time.

    Raises ValueError for a value out of range. Papers: arXiv:2403.03206. Reference: diffusers' `FluxPipeline`."""
    steps, guidance, width, height = resolve("generate", flux, width, height, steps, guidance, seed, num_images, true_cfg, sigmas,
                                             output)
    text = repeat(encode_prompt(flux, prompt, max_text_tokens), num_images)
    h, w = height // 8, width // 8
    z = noise(range(seed, seed + len(text)), h, w, flux.mmdit.config.out_channels // 4, text.txt.dtype)
    x = patchify(z.to(text.txt.device))                                         # (B, N, 64)
    ts = schedule(steps, x.shape[1], dynamic_shift=flux.config.dynamic_shift, shift=flux.config.shift, sigmas=sigmas)
    velocity = flow(flux.mmdit, text.txt, text.vec, guidance, image_ids(h, w, device=x.device))
    if true_cfg > 1 and negative_prompt is not None:
        negative = match(encode_prompt(flux, negative_prompt, max_text_tokens), len(text))
        unwanted = flow(flux.mmdit, negative.txt, negative.vec, guidance, image_ids(h, w, device=x.device))
        velocity = classifier_free(velocity, unwanted, true_cfg)
    x = euler(velocity, x, ts, on_step and (lambda step, t, x: on_step(step, t, unpatchify(x, h, w))), progress)
    return finish(flux, unpatchify(x, h, w), output)


def main() -> None:
    from . import cli

    parser = cli.parser("generate", "Paint a picture from text.")
    cli.run(parser, generate)


if __name__ == "__main__":
    main()
