"""Image to image: begin from an image instead of from noise.

    python -m miniflux.image_to_image "a fox in the snow" --image sketch.png --strength 0.7

The image's latents z are noised to x = t · eps + (1 - t) · z, where t is the time at which the last
`strength` of the steps begin; from there on everything is as in `generate` (SDEdit, Meng et al.
2021, arXiv:2108.01073). The seam: another start.
"""

from typing_extensions import Unpack

from .command import command
from .flux import Flux
from .generate import sample
from .imaging.images import Images, preprocess
from .imaging.reading import ImageLike, read_images, size_of
from .latents import encode
from .prompt import PromptLike
from .settings import AdapterSettings, resolve, task


@task
def image_to_image(flux: Flux, prompt: PromptLike, image: ImageLike | list[ImageLike], *,
                   strength: float = 0.6, **settings: Unpack[AdapterSettings]) -> Images:
    """Repaint an image after a prompt.

    image: one image (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list, one for each prompt.
    strength: in (0, 1], how much of the way back to noise it goes; at 1 nothing is left of it.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError or FileNotFoundError for what is no image, and for a value out of range.
    Reference: diffusers' `FluxImg2ImgPipeline` and `FluxControlNetImg2ImgPipeline`, with the mean
    of the autoencoder's posterior."""
    images = read_images(image, "image")
    call = resolve("image_to_image", flux, settings, like=size_of(images[0]), strength=strength)
    start = encode(flux, preprocess(images, call.width, call.height))           # (n, 16, h, w)
    return sample(flux, prompt, call, start=start)


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("image_to_image", "Repaint a picture after a prompt.")
    parser.add_argument("--image", required=True, help="the picture to begin from (required)")
    flags.add_strength(parser, 0.6)
    flags.add_controls(parser)
    flags.add_ip_images(parser)
    cli.run(parser, image_to_image)


if __name__ == "__main__":
    main()
