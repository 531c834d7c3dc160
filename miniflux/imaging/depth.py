"""Depth: how near each part of a picture is, by Depth Anything: the control picture of FLUX.1 Depth.

    miniflux depth photo.png --model LiheYoung/depth-anything-large-hf --output depth.png

Two references prepare the picture differently, and their control pictures differ:

    native (default)    diffusers' examples: the picture as it is, in [0, 1], and the depths stretched over black to white
    standard            the original repository: resized to about 518 x 518 and normalised as the network was trained, and the
                        depths as they come, taken for bytes

Near is bright. Reference: `DepthPreprocessor` of huggingface/image_gen_aux; `DepthImageEncoder` of the original repository.
"""

import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checkpoints.vision import find_folder, load_depth_anything
from ..command import Parser, command
from ..devices import find_device
from ..networks.depth_anything import DepthAnything
from .images import BICUBIC, IMAGENET_COLOURS, standardise, to_pil, to_tensor
from .reading import ImageLike, read_image, size_of
from .saving import check_output, save

MAX_PIXELS = 4096 * 4096


def load_depth(source: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
               ) -> DepthAnything:
    """Depth Anything, V1 or V2, from a folder or by its Hub id."""
    return load_depth_anything(find_folder(source, "LiheYoung/depth-anything-large-hf"), find_device(device), dtype)


@torch.no_grad()
def depth(image: ImageLike, net: DepthAnything, *, standard: bool = False) -> Image.Image:
    """An RGB picture of the same size, grey: near is bright.

    standard: prepare the picture as the network was trained, and do not stretch the depths (see above).
    Raises ValueError or FileNotFoundError for what is no picture, or one that is too small, too narrow or too large."""
    picture = read_image(image)
    width, height = size_of(picture)
    seen = standard_size(width, height, net) if standard else (width, height)
    if min(seen) < net.config.patch_size or seen[0] * seen[1] > MAX_PIXELS:
        raise ValueError(f"the picture has {width} x {height} pixels, which the depth estimator would read as {seen[0]} x {seen[1]}: "
                         f"expected sides of at least {net.config.patch_size} and no more than {MAX_PIXELS:,} pixels")
    x = to_tensor(picture, *seen, BICUBIC)                                      # (1, 3, H, W) in [0, 1]
    if standard:
        if net.config.metric:
            raise ValueError("a metric depth estimator tells metres, not bytes: leave standard out")
        x = standardise(x, IMAGENET_COLOURS)
    near = nearness(net, x.to(next(net.parameters())))[None].float().cpu()      # (1, 1, H', W')
    if standard:
        # Note: these depths are of no fixed scale; where they exceed a byte, the original repository lets them exceed white.
        near = F.interpolate(near, size=(height, width), mode="bicubic", antialias=True) / 255
    else:
        near = F.interpolate(near, size=(height, width), mode="bilinear", align_corners=False)
        low, high = near.aminmax()
        near = (near - low) / (high - low).clamp(min=1e-12)
    return to_pil(near.clamp(0, 1).expand(-1, 3, -1, -1))[0]


def nearness(net: DepthAnything, x: Tensor) -> Tensor:
    """What a relative network says; of a metric one the inverse, which grows like it does."""
    y = net(x)                                                                  # (1, H', W')
    return 1 / y.clamp(min=net.config.max_depth / 100) if net.config.metric else y


def standard_size(width: int, height: int, net: DepthAnything) -> tuple[int, int]:
    """Both sides scaled by that factor which brings one of them to the size of the network and is nearer to 1, in patches.

    With the official 518 and 14: 640 x 480 is read as 686 x 518."""
    patch, size = net.config.patch_size, net.config.image_size
    scale = min(size / height, size / width, key=lambda scale: abs(1 - scale))
    return round(scale * width / patch) * patch, round(scale * height / patch) * patch


@command
def main() -> None:
    parser = Parser(prog="miniflux depth", description="Tell how near each part of a picture is: near is bright.")
    parser.add_argument("picture", help="the picture to look at")
    parser.add_argument("--model", required=True, help="the folder or Hub id of a Depth Anything (required)")
    parser.add_argument("--output", default="depth.png", help="the picture to write (default depth.png)")
    parser.add_argument("--standard", action="store_true", help="as the original repository prepares it (default: as diffusers does)")
    parser.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    args = parser.parse_args()
    try:
        output = check_output(args.output)
        save(depth(args.picture, load_depth(args.model, device=args.device), standard=args.standard), output, {})
        print(output)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
