"""Depth: how near each part of an image is, by Depth Anything. The control image of FLUX.1 Depth.

    miniflux depth photo.png --model LiheYoung/depth-anything-large-hf --output depth.png

Two references prepare the image differently, and their control images differ:

    native (default)    diffusers' examples: the image as it is, in [0, 1]; the depths are stretched
                        from black to white
    standard            the original repository: the image is resized to about 518 x 518 and
                        normalised as the network was trained; the depths are used as bytes

Near is bright. References: `DepthPreprocessor` of huggingface/image_gen_aux; `DepthImageEncoder` of
the original repository.
"""

import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checkpoints.vision import find_folder, load_depth_anything
from ..command import Parser, command, say
from ..devices import find_device
from ..networks.depth_anything import DepthAnything
from .images import BICUBIC, IMAGENET_COLOURS, standardise, to_pil, to_tensor
from .reading import ImageLike, read_image, size_of
from .saving import check_output, save

MAX_PIXELS = 4096 * 4096


def load_depth(source: str | os.PathLike, *, device: torch.device | str | None = None,
               dtype: torch.dtype = torch.float32) -> DepthAnything:
    """Depth Anything, V1 or V2, from a folder or by its Hub id."""
    folder = find_folder(source, "LiheYoung/depth-anything-large-hf")
    return load_depth_anything(folder, find_device(device), dtype)


@torch.no_grad()
def depth(image: ImageLike, net: DepthAnything, *, standard: bool = False) -> Image.Image:
    """A grey RGB image of the same size: near is bright.

    image: a path, a PIL image, an array or a tensor.
    net: from `load_depth`.
    standard: prepare the image as the network was trained, and do not stretch the depths.

    Raises ValueError or FileNotFoundError for anything that is no image, or one that is too small,
    too narrow or too large."""
    image = read_image(image)
    width, height = size_of(image)
    seen = standard_size(width, height, net) if standard else (width, height)
    if min(seen) < net.config.patch_size or seen[0] * seen[1] > MAX_PIXELS:
        raise ValueError(f"the image has {width} x {height} pixels, which the depth estimator "
                         f"would read as {seen[0]} x {seen[1]}: expected sides of at least "
                         f"{net.config.patch_size} and no more than {MAX_PIXELS:,} pixels")
    x = to_tensor(image, *seen, BICUBIC)                    # (1, 3, H, W) in [0, 1]
    if standard:
        if net.config.metric:
            raise ValueError("a metric depth estimator estimates metres, not bytes: "
                             "leave standard out")
        x = standardise(x, IMAGENET_COLOURS)
    near = nearness(net, x.to(next(net.parameters())))[None].float().cpu()      # (1, 1, H', W')
    if standard:
        # Note: these depths have no fixed scale. Where they exceed a byte, they exceed white, as in
        # the original repository.
        near = F.interpolate(near, size=(height, width), mode="bicubic", antialias=True) / 255
    else:
        near = F.interpolate(near, size=(height, width), mode="bilinear", align_corners=False)
        low, high = near.aminmax()
        near = (near - low) / (high - low).clamp(min=1e-12)
    return to_pil(near.clamp(0, 1).expand(-1, 3, -1, -1))[0]


def nearness(net: DepthAnything, x: Tensor) -> Tensor:
    """The output of a relative network; the inverse of a metric one's, which grows alike."""
    y = net(x)                                                                  # (1, H', W')
    return 1 / y.clamp(min=net.config.max_depth / 100) if net.config.metric else y


def standard_size(width: int, height: int, net: DepthAnything) -> tuple[int, int]:
    """The size at which a network reads an image, in whole patches.

    Both sides are scaled by one factor, which brings one of them to the size of the network; of the
    two such factors, the one nearer to 1. With the official 518 and 14, 640 x 480 becomes
    686 x 518."""
    patch, size = net.config.patch_size, net.config.image_size
    scale = min(size / height, size / width, key=lambda scale: abs(1 - scale))
    return round(scale * width / patch) * patch, round(scale * height / patch) * patch


@command
def main() -> None:
    parser = Parser(prog="miniflux depth", description="Estimate depths: near is bright.")
    parser.add_argument("image", help="the image to read")
    parser.add_argument("--model", required=True,
                        help="the folder or Hub id of a Depth Anything (required)")
    parser.add_argument("--output", default="depth.png",
                        help="the image to write (default depth.png)")
    parser.add_argument("--standard", action="store_true",
                        help="as in the original repository (default: as in diffusers)")
    parser.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    args = parser.parse_args()
    try:
        output = check_output(args.output)
        net = load_depth(args.model, device=args.device)
        save(depth(args.image, net, standard=args.standard), output, {})
        say(output)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
