"""An invisible watermark: a few bits repeated over a picture's colour, which survive small changes.

    picture -> U, the blueness beside the brightness -> sums of 2x2 pixels (the first level of a Haar wavelet transform)
            -> blocks of 4x4 sums, one bit each, in turn: the largest sum but the first becomes (n + 1/4 + bit/2) · STEP

and is read back from where the largest sum lies between two multiples of STEP; the blocks of one bit vote. The brightness stays
as it is. This is the method "dwtDct" of the library invisible-watermark, which reads these marks, and the message is that of the
original repository (whose 48 bits lose their two leading zeros on the way).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import Images, to_pil, to_tensor
from .reading import ImageLike, RGBImage, read_each, size_of

MESSAGE = [int(bit) for bit in f"{0b001010101111111010000111100111001111010100101110:b}"]
STEP, MARGIN = 36.0, 4.0               # MARGIN: room for rounding


def add_watermark(pictures: ImageLike | list[ImageLike], message: Sequence[int] = MESSAGE) -> Images:
    """The pictures with the message in them: a tensor (B, 3, H, W) in [0, 1] as a tensor, others as a list of PIL pictures.

    Raises ValueError for pictures with fewer blocks of 8x8 pixels than the message has bits, and for what is no picture."""
    if not is_batch(pictures):
        return [to_pil(add_watermark(batch_of(picture), message))[0] for picture in read_each(pictures)]
    pixels = (255 * pictures.float()).round()                                   # (B, 3, H, W)
    sums, bits = blocks(pixels), repeat(message, pictures)                      # (B, n, 16), (n,)
    largest = sums[..., 1:].topk(2, dim=-1)
    place, (value, second) = largest.indices[..., :1] + 1, largest.values.unbind(-1)
    target = ((value / STEP).floor() + 0.25 + 0.5 * bits) * STEP
    # Note: the library lets the sum fall below the block's next one, which is then read in its place.
    target = target + STEP * (target < second + MARGIN)
    change = torch.zeros_like(sums).scatter(-1, place, (target - value)[..., None])
    # Note: where blue is full already, as on white, nothing can rise (the library's marks are lost there): the whole block falls
    # to the next value that reads as its bit.
    wrong = (read_bits(shift(pixels, change)) != bits)[..., None]
    top = STEP / 2 * (1 + bits) - MARGIN
    lower = ((value - top) / STEP).floor() * STEP + top
    change = torch.where(wrong, (lower[..., None] - sums).clamp(max=0), change)
    return (shift(pixels, change) / 255).to(pictures.dtype)


def read_watermark(pictures: ImageLike | list[ImageLike], length: int = len(MESSAGE)) -> list[list[int]]:
    """The bits in each of the pictures, whatever they mean: without a mark they are noise.

    pictures: a tensor (B, 3, H, W) in [0, 1], or one picture of any kind, or a list of them.
    Raises ValueError for pictures that have no room for so many bits, and for what is no picture."""
    if not is_batch(pictures):
        return [read_watermark(batch_of(picture), length)[0] for picture in read_each(pictures)]
    votes = read_bits((255 * pictures.float()).round()).float()
    turn = repeat(list(range(length)), pictures)                                # (n,), whose turn it is
    shares = torch.stack([votes[:, turn == i].mean(dim=1) for i in range(length)], dim=1)   # (B, length)
    return (shares > 0.5).int().tolist()


def is_batch(pictures) -> bool:
    return isinstance(pictures, Tensor) and pictures.ndim == 4 and pictures.shape[1] == 3 and pictures.is_floating_point()


def batch_of(picture: RGBImage) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return to_tensor(picture, *size_of(picture))


def read_bits(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) bytes -> the bit of each block: (B, n)."""
    return blocks(pixels)[..., 1:].amax(dim=-1) % STEP > STEP / 2


def shift(pixels: Tensor, change: Tensor) -> Tensor:
    """The pictures (B, 3, H, W) whose blocks of sums have changed by (B, n, 16): U alone changes, in red, green and blue this much,
    which leaves the brightness."""
    change = spread(change / 2, pixels)                                         # (B, H, W), each of four pixels gets its share
    pixels = pixels + change[:, None] * torch.tensor([0.0, -0.395, 2.032], device=pixels.device).view(3, 1, 1)
    return pixels.round().clamp(0, 255)


def repeat(message: list[int], pictures: Tensor) -> Tensor:
    """The message over and over, one number a block."""
    count = (pictures.shape[-2] // 8) * (pictures.shape[-1] // 8)
    if not 0 < len(message) <= count:
        raise ValueError(f"a picture of {pictures.shape[-1]} x {pictures.shape[-2]} pixels has room for {count} bits, not {len(message)}: "
                         "make it larger, or leave the watermark out")
    return torch.tensor(message, device=pictures.device)[torch.arange(count, device=pictures.device) % len(message)]


def blocks(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) bytes -> sums of U over 2x2 pixels, halved, in blocks of 4x4, row by row: (B, n, 16)."""
    red, green, blue = pixels.unbind(1)
    u = 0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue)) + 128     # OpenCV's, for bytes: about 17 to 239
    h, w = u.shape[-2] // 8, u.shape[-1] // 8
    u = u[:, :8 * h, :8 * w].unflatten(2, (w, 4, 2)).unflatten(1, (h, 4, 2))    # (B, h, 4, 2, w, 4, 2)
    return u.sum(dim=(3, 6)).div(2).transpose(2, 3).flatten(3).flatten(1, 2)    # (B, h·w, 16)


def spread(change: Tensor, pixels: Tensor) -> Tensor:
    """(B, n, 16) -> (B, H, W), each number on its 2x2 pixels, zero beyond the last whole block."""
    height, width = pixels.shape[-2:]
    h, w = height // 8, width // 8
    change = change.unflatten(-1, (4, 4)).unflatten(1, (h, w)).transpose(2, 3).flatten(3).flatten(1, 2)     # (B, 4h, 4w)
    change = change.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)     # (B, 8h, 8w)
    return F.pad(change, (0, width - 8 * w, 0, height - 8 * h))
