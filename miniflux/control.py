"""Control: paint along the edges or depths of a control image (FLUX.1 Canny and Depth).

    python -m miniflux.control "a robot made of glass" --model canny --canny robot.webp
    python -m miniflux.control "a robot made of glass" --model depth --depth robot.webp \
        --depth-model LiheYoung/depth-anything-large-hf

Each token carries the 64 latent channels of the control image beside its own. The seam: what enters
the transformer; with an image to begin from, also the start (as `image_to_image`), and with a mask
the velocity (as `inpaint`).
"""

from argparse import Namespace

from typing_extensions import Unpack

from .command import command
from .flux import Flux
from .generate import sample
from .imaging.canny import canny
from .imaging.depth import depth, load_depth
from .imaging.images import Images, natural_size, preprocess
from .imaging.masks import fit_masks, latent_mask, read_masks
from .imaging.reading import ImageLike, read_images, size_of
from .latents import encode
from .prompt import PromptLike
from .sampling import Conditions, patchify
from .settings import Settings, resolve, task


@task
def control(flux: Flux, prompt: PromptLike, control_image: ImageLike | list[ImageLike], *,
            image: ImageLike | list[ImageLike] | None = None,
            mask: ImageLike | list[ImageLike] | None = None,
            strength: float = 0.6, **settings: Unpack[Settings]) -> Images:
    """Paint along a control image: edges (see `canny`) or depths (near is bright).

    control_image: one (PIL, path, array (H, W, 3), tensor (3, H, W)), or a list, one for each
        prompt; edges or depths, as the model was made for.
    image, strength: begin from an image, as `image_to_image` does; default: from noise.
    mask: repaint only its white part of `image`, as `inpaint` does; default: everywhere.

    guidance is 3.5 by default, with `image` 7; the makers of the models recommend 30 for edges and
    10 for depths.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError or FileNotFoundError for what is no image, an empty mask, a mask without an
    image, a model without the 128 channels, or a value out of range.
    Reference: diffusers' `FluxControlPipeline`, `FluxControlImg2ImgPipeline` and
    `FluxControlInpaintPipeline`, with the mean of the autoencoder's posterior."""
    if mask is not None and image is None:
        raise ValueError("there is a mask but no image whose part it could show: give image= too")
    controls = read_images(control_image, "control image")
    task = "control" if image is None else "control of an image"
    call = resolve(task, flux, settings, like=size_of(controls[0]),
                   strength=1.0 if image is None else strength)
    size = call.width, call.height
    cond = Conditions(img_cond=patchify(encode(flux, preprocess(controls, *size))))    # (n, N, 64)
    if image is None:
        return sample(flux, prompt, call, cond)
    images = read_images(image, "image")
    hole = None if mask is None else latent_mask(fit_masks(read_masks(mask, images), *size))
    start = encode(flux, preprocess(images, *size))                             # (n, 16, h, w)
    return sample(flux, prompt, call, cond, start=start, mask=hole)


def control_image_of(flux: Flux, args: Namespace) -> dict:
    """The control image that the flags ask for.

    Edges and depths are found at the size of the result, where they stay sharp."""
    source = args.canny or args.depth
    if source is None:
        return {"control_image": args.control_image}
    if args.depth and not args.depth_model:
        raise ValueError("--depth needs an estimator: give --depth-model, such as "
                         "LiheYoung/depth-anything-large-hf")
    photo = read_images(source, "image")
    size = natural_size(size_of(photo[0]), flux.config.size ** 2, args.width, args.height)
    image = preprocess(photo, *size)[0] / 2 + 0.5                               # (3, H, W)
    if args.canny:
        return {"control_image": canny(image, *args.thresholds)}
    estimator = load_depth(args.depth_model, device=args.device)
    return {"control_image": depth(image, estimator, standard=args.depth_standard)}


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("control", "Paint after a prompt along edges or depths.", prompt=False)
    parser.add_argument("prompt", nargs="?", default="",
                        help="what to paint (default: nothing in particular)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--control-image", help="an image of edges or depths, as the model needs")
    source.add_argument("--canny", help="a photo, whose edges become the control image")
    source.add_argument("--depth", help="a photo, whose depths --depth-model estimates")
    parser.add_argument("--depth-model",
                        help="the folder or Hub id of a Depth Anything (default: none)")
    parser.add_argument("--depth-standard", action="store_true",
                        help="as in the original repository; see `miniflux depth --help` "
                             "(default: off)")
    parser.add_argument("--thresholds", type=float, nargs=2, default=(50, 200),
                        metavar=("LOW", "HIGH"), help="of the edges' strength (default 50 200)")
    parser.add_argument("--image", help="an image to begin from (default: none)")
    parser.add_argument("--mask", help="white where that image is repainted (default: everywhere)")
    flags.add_strength(parser, 0.6)
    cli.run(parser, control, control_image_of)


if __name__ == "__main__":
    main()
