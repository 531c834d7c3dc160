"""Image to image: begin from a picture instead of from noise.

    python -m miniflux.image_to_image "a fox in the snow" --image sketch.png --strength 0.7

The picture's latents z are noised to x = t · noise + (1 - t) · z, where t is the time at which the last `strength` of the steps
begin; from there on everything is as in `generate` (SDEdit, Meng et al. 2021, arXiv:2108.01073). The seam: another start.
"""

from collections.abc import Sequence

import torch

from .adapters.ip_adapter import IPImage, IPScale, read_ip_images
from .controlnet import Controls, read_controls
from .flux import Flux
from .generate import paint
from .images import Picture, Pictures, fit, read_pictures, size_of
from .latents import encode
from .prompt import Text
from .sampling import OnFinish, OnStep
from .settings import resolve


@torch.no_grad()
def image_to_image(flux: Flux, prompt: Text, image: Picture | list[Picture], *, strength: float = 0.6, width: int | None = None,
                   height: int | None = None, steps: int | None = None, guidance: float | None = None, seed: int = 0,
                   num_images: int = 1, negative_prompt: Text | None = None, true_cfg: float = 1.0,
                   sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None, controlnet: Controls | None = None,
                   ip_image: IPImage | None = None, ip_scale: IPScale = 1.0, negative_ip_image: IPImage | None = None,
                   output: str = "pil", progress: bool = True, on_step: OnStep | None = None,
                   on_finish: OnFinish | None = None) -> Pictures:
    """Repaint a picture after a prompt.

    image: one picture (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list of them, one for each prompt. strength: in
    (0, 1], how much of the way back to noise it goes: at 1 nothing is left of it. width, height: by default the picture's
    shape at the model's number of pixels. guidance: default 7. The other keywords are those of `generate`.

    Raises ValueError or FileNotFoundError for what is no picture, and for a value out of range.
    Reference: diffusers' `FluxImg2ImgPipeline` and `FluxControlNetImg2ImgPipeline`, with the mean of the autoencoder's posterior."""
    pictures, controls = read_pictures(image, "image"), read_controls(flux, controlnet)
    call = resolve("image_to_image", flux, width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg, sigmas,
                   max_text_tokens, output, progress, on_step, on_finish, like=size_of(pictures[0]), strength=strength)
    return paint(flux, prompt, call, start=encode(flux, fit(pictures, call.width, call.height)), controls=controls,
                 ip=read_ip_images(flux, ip_image, ip_scale, negative_ip_image))


def main() -> None:
    from . import cli

    parser = cli.parser("image_to_image", "Repaint a picture after a prompt.")
    parser.add_argument("--image", required=True, help="the picture to begin from (required)")
    cli.add_strength(parser, 0.6)
    cli.add_controls(parser)
    cli.add_ip_images(parser)
    cli.run(parser, image_to_image)


if __name__ == "__main__":
    main()
