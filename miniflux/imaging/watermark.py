"""An invisible watermark: a few bits, repeated over the colour of an image.

    image -> U, the blueness beside the brightness
          -> sums of 2x2 pixels (the first level of a Haar wavelet transform)
          -> blocks of 4x4 sums, each of which carries one bit of the message, in turn:
             its largest sum but the first becomes (n + 1/4 + bit/2) · STEP

A bit is read from the place of that sum between two multiples of STEP; the blocks of one bit vote.
The brightness stays as it is, and small changes of the image do no harm. This is the method
"dwtDct" of the library invisible-watermark, which reads these marks. The message is the original
repository's (whose 48 bits lose their two leading zeros on the way).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import Images, to_pil, to_tensor
from .reading import ImageLike, RGBImage, read_each, size_of

MESSAGE = [int(bit) for bit in f"{0b001010101111111010000111100111001111010100101110:b}"]
STEP = 36.0
MARGIN = 4.0               # room for rounding
BLUENESS = (0.0, -0.395, 2.032)        # by how much red, green and blue change with U


def add_watermark(images: ImageLike | list[ImageLike], message: Sequence[int] = MESSAGE) -> Images:
    """The images with the message in them.

    images: a tensor (B, 3, H, W) in [0, 1], which is returned as a tensor; or one image of any
        kind, or a list of them, which are returned as a list of PIL images.
    message: bits.

    Raises ValueError for images with fewer blocks of 8x8 pixels than the message has bits, and for
    anything that is no image."""
    if not is_batch(images):
        marked = [add_watermark(batch_of(image), message) for image in read_each(images)]
        return [to_pil(image)[0] for image in marked]
    pixels = (255 * images.float()).round()                                     # (B, 3, H, W)
    sums = blocks(pixels)                                                       # (B, n, 16)
    bits = bit_of_each_block(message, images)                                   # (n,)
    largest = sums[..., 1:].topk(2, dim=-1)
    place = largest.indices[..., :1] + 1                                        # (B, n, 1)
    value, second = largest.values.unbind(-1)                                   # (B, n)
    target = ((value / STEP).floor() + 0.25 + 0.5 * bits) * STEP
    # Note: the library lets the sum fall below the next largest, which is then read in its place.
    target = target + STEP * (target < second + MARGIN)
    change = torch.zeros_like(sums).scatter(-1, place, (target - value)[..., None])
    # Note: where blue is full, as on white, nothing can rise, and the library's marks are lost.
    # Here the whole block falls to the next value that reads as its bit.
    wrong = (read_bits(shift(pixels, change)) != bits)[..., None]
    top = STEP / 2 * (1 + bits) - MARGIN
    lower = ((value - top) / STEP).floor() * STEP + top
    change = torch.where(wrong, (lower[..., None] - sums).clamp(max=0), change)
    return (shift(pixels, change) / 255).to(images.dtype)


def read_watermark(images: ImageLike | list[ImageLike],
                   length: int = len(MESSAGE)) -> list[list[int]]:
    """The bits in each of the images; without a watermark they are noise.

    images: a tensor (B, 3, H, W) in [0, 1], or one image of any kind, or a list of them.
    length: how many bits.

    Raises ValueError for images that have no room for so many bits, and for anything that is no
    image."""
    if not is_batch(images):
        return [read_watermark(batch_of(image), length)[0] for image in read_each(images)]
    votes = read_bits((255 * images.float()).round()).float()                   # (B, n)
    position = bit_of_each_block(list(range(length)), images)                   # (n,)
    means = [votes[:, position == i].mean(dim=1) for i in range(length)]
    return (torch.stack(means, dim=1) > 0.5).int().tolist()                     # (B, length)


def is_batch(images: object) -> bool:
    """Whether this is a tensor (B, 3, H, W) of floats."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        return False
    return images.shape[1] == 3 and images.is_floating_point()


def batch_of(image: RGBImage) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return to_tensor(image, *size_of(image))


def read_bits(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) bytes -> the bit of each block: (B, n)."""
    return blocks(pixels)[..., 1:].amax(dim=-1) % STEP > STEP / 2


def shift(pixels: Tensor, change: Tensor) -> Tensor:
    """The images (B, 3, H, W) after their blocks of sums have changed by (B, n, 16).

    Only U changes, which leaves the brightness."""
    # Each of the four pixels of a sum gets its share.
    change = unblock(change / 2, pixels)                                        # (B, H, W)
    colour = torch.tensor(BLUENESS, device=pixels.device).view(3, 1, 1)
    return (pixels + change[:, None] * colour).round().clamp(0, 255)


def bit_of_each_block(message: Sequence[int], images: Tensor) -> Tensor:
    """The message over and over, one number a block: (n,)."""
    height, width = images.shape[-2:]
    count = (height // 8) * (width // 8)
    if not 0 < len(message) <= count:
        raise ValueError(f"an image of {width} x {height} pixels has room for {count} bits, not "
                         f"{len(message)}: make it larger, or leave the watermark out")
    position = torch.arange(count, device=images.device) % len(message)
    return torch.tensor(message, device=images.device)[position]


def blocks(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) bytes -> sums of U over 2x2 pixels, halved, in blocks of 4x4: (B, n, 16).

    The blocks follow each other row by row."""
    red, green, blue = pixels.unbind(1)
    # U as in OpenCV, for bytes: about 17 to 239.
    u = 0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue)) + 128     # (B, H, W)
    h, w = u.shape[-2] // 8, u.shape[-1] // 8
    u = u[:, :8 * h, :8 * w]                                                    # (B, 8h, 8w)
    u = u.unflatten(2, (w, 4, 2)).unflatten(1, (h, 4, 2))   # (B, h, 4, 2, w, 4, 2)
    sums = u.sum(dim=(3, 6)) / 2                                                # (B, h, 4, w, 4)
    return sums.transpose(2, 3).flatten(3).flatten(1, 2)                        # (B, h·w, 16)


def unblock(change: Tensor, pixels: Tensor) -> Tensor:
    """(B, n, 16) -> (B, H, W): each number on its 2x2 pixels, zero beyond the last whole block."""
    height, width = pixels.shape[-2:]
    h, w = height // 8, width // 8
    change = change.unflatten(-1, (4, 4)).unflatten(1, (h, w))                  # (B, h, w, 4, 4)
    change = change.transpose(2, 3).flatten(3).flatten(1, 2)                    # (B, 4h, 4w)
    change = change.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)     # (B, 8h, 8w)
    return F.pad(change, (0, width - 8 * w, 0, height - 8 * h))
