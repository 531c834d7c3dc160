"""Which objects are in an image of the tiny world, where, and on which ground? A judge without a
neural network, which is given neither the prompt nor the model.

The ground is the plain colour nearest (in RGB) to the median g of the pixels along the border.

The objects are found by sprite matching. Each glyph o, in each colour that it can have, in sizes s
from 45 to 108 pixels, is laid on the ground just found, at all places p. Sprite and image x, both
less the ground, are compared by their slopes, blurred by about 2 pixels, within the sprite's box:

    T = alpha(o, s, p) · (glyph(o, s, p) - g),   D = x - g
    gain(o, s, p)  = ⟨∇D, ∇T⟩² / ‖∇T‖²                     what T explains of the image at best
    score(o, s, p) = 2 ⟨∇D, ∇T⟩ / (‖∇D‖²_box + ‖∇T‖²)      at most 1, which only D = T reaches

The first object is the one that explains most; the next is the best whose box lies elsewhere; and
so on, as long as it explains a twelfth of what the first does, and its score, a measure of
sharpness, reaches 0.6 of the first's. Slopes, because a blob of the right colour has most of an
object's brightness, but few of its slopes. All places at once are one product of Fourier
coefficients, up to 15 waves a side.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..world.glyphs import COLOURS, stamp
from ..world.grounds import IMAGE_SIZE, PLAIN
from ..world.words import ALL_OBJECTS, RECOLOURABLE

THRESHOLD = 0.7                          # the score of a sharp object
SIZES = (45, 50, 56, 62, 70, 78, 87, 97, 108)   # of a sprite, in pixels: in steps of an eighth
BORDER = 5                               # pixels that show the ground: few objects reach them
PLACES = 32                              # along a side: every fourth pixel
FAINT = 0.08                             # of the first object's gain: less is no object
ALIKE = 0.6                              # of the first object's score: less is no object
MOST = 6                                 # objects that are searched for
_FY, _FX = np.arange(-15, 16), np.arange(16)    # 31 waves from top to bottom, 16 from left to right
_KX, _KY = (torch.from_numpy(np.float32(k)) for k in np.meshgrid(_FX, _FY))
_SQUARE = _KX**2 + _KY**2                # slopes of slopes
_BLUR = torch.exp(-_SQUARE / 200)
_EDGE = np.pad(np.zeros((IMAGE_SIZE - 2 * BORDER,) * 2, bool), BORDER, constant_values=True)


@dataclass(frozen=True)
class Found:
    """An object that the judge sees: word, colour (None: that of the glyph), centre and size in
    pixels, score."""

    name: str
    colour: str | None
    x: int
    y: int
    size: int
    score: float


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: a ground of `PLAIN`, and objects, the one that explains most first."""

    ground: str
    found: tuple[Found, ...]

    @property
    def object(self) -> str:
        return self.found[0].name

    @property
    def score(self) -> float:
        return self.found[0].score

    @property
    def sharp(self) -> bool:
        """Whether the image is as near to the sprite as only a clean, undistorted one is."""
        return self.score >= THRESHOLD


@lru_cache(maxsize=1)
def variants() -> list[tuple[str, str | None]]:
    """Every object as its glyph is, and each that can be recoloured in all other colours."""
    plain = [(name, None) for name in ALL_OBJECTS]
    return plain + [(name, colour) for name in RECOLOURABLE for colour in COLOURS
                    if colour != RECOLOURABLE[name]]


def waves(x: Tensor) -> Tensor:
    """(..., 128, 128) -> the Fourier coefficients of its blur: (..., 31, 16)."""
    return torch.fft.rfft2(x)[..., _FY, :len(_FX)] * _BLUR


def places(coefficients: Tensor) -> Tensor:
    """(..., 31, 16) -> the real image at every fourth pixel: (..., 32, 32)."""
    full = coefficients.new_zeros(*coefficients.shape[:-2], PLACES, PLACES // 2 + 1)
    full[..., _FY, :len(_FX)] = coefficients
    return torch.fft.irfft2(full, s=(PLACES, PLACES))


@lru_cache(maxsize=1)
def sprites() -> Tensor:
    """Slopes of every variant in every size, in the middle of an image: red, green, blue (times
    alpha), alpha: (V, S, 4, 31, 16).

    Raises FileNotFoundError without the font."""
    bank = []
    for name, colour in variants():
        canvas = np.zeros((len(SIZES), 4, IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for layer, size in zip(canvas, SIZES):
            rgba = np.moveaxis(np.float32(stamp(name, colour, size)) / 255, -1, 0)
            edge = (IMAGE_SIZE - size) // 2
            box = slice(edge, edge + size)
            layer[:, box, box] = np.concatenate([rgba[:3] * rgba[3:], rgba[3:]])
        bank.append(waves(torch.from_numpy(canvas)))
    return torch.stack(bank)


def judge(images: np.ndarray) -> list[Verdict]:
    """Look at images (n, 128, 128, 3) uint8, one by one."""
    return [_judge(image) for image in images]


@torch.inference_mode()
def _judge(image: np.ndarray) -> Verdict:
    x = np.float32(image) / 255
    g = np.median(x[_EDGE], axis=0)
    gain, score = _match(x, g)
    best_gain, best = gain.max(0)                                               # (S, 32, 32)
    found = _pick(best_gain, best, score)
    distance = {name: np.square(np.float32(rgb) / 255 - g).sum() for name, rgb in PLAIN.items()}
    return Verdict(min(distance, key=distance.get), tuple(found))


def _match(x: np.ndarray, g: np.ndarray) -> tuple[Tensor, Tensor]:
    """Gain and score of every variant, size and place, for an image x (128, 128, 3) on the ground
    colour g (3,): (V, S, 32, 32) each."""
    d = waves(torch.from_numpy(np.moveaxis(x - g, -1, 0).copy()))               # (3, 31, 16)
    bank = sprites()
    t = bank[:, :, :3] - torch.from_numpy(g)[:, None, None] * bank[:, :, 3:]    # (V, S, 3, 31, 16)
    middle = (PLACES // 2, PLACES // 2)
    inner = places(_SQUARE * (t.conj() * d).sum(2)).roll(middle, (-2, -1))      # (V, S, 32, 32)
    weight = _SQUARE * (1 + (_KX > 0)) / PLACES**2      # Parseval: a wave and its conjugate
    own = (weight * t.abs().square()).sum((2, 3, 4))[..., None, None]           # (V, S, 1, 1)
    slopes = _energy(d)[None, None]
    boxes = torch.cat([_box_sum(slopes, (size + 8) * PLACES // IMAGE_SIZE)[0] for size in SIZES])
    score = 2 * inner / (boxes + own)
    return inner.clamp(min=0).square() / own, score


def _energy(coefficients: Tensor) -> Tensor:
    """(..., C, 31, 16) -> the square of the slopes at each place, summed over channels."""
    return sum(places(1j * k * coefficients).square().sum(-3) for k in (_KX, _KY))


def _box_sum(x: Tensor, side: int) -> Tensor:
    """Sums over squares of an odd number of places about each place: (B, C, H, W), zeros beyond the
    edge."""
    side = side // 2 * 2 + 1
    mean = F.avg_pool2d(x, side, stride=1, padding=side // 2, count_include_pad=True)
    return mean * side**2


def _pick(gain: Tensor, best: Tensor, score: Tensor) -> list[Found]:
    """The objects, one after the other, from the gain (S, 32, 32) of the best variant at each size
    and place; its number; and the score (V, S, 32, 32)."""
    for layer, size in zip(gain, SIZES):                # a box lies inside, but for a few pixels
        edge = max(size * PLACES // IMAGE_SIZE // 2 - 1, 1)
        for border in (layer[:edge], layer[-edge:], layer[:, :edge], layer[:, -edge:]):
            border.fill_(-1)
    found: list[Found] = []
    most = float(gain.max())
    while len(found) < MOST and gain.max() >= FAINT * most:
        s, y, x = (int(i) for i in np.unravel_index(int(gain.argmax()), gain.shape))
        number = int(best[s, y, x])
        o = Found(*variants()[number], x * IMAGE_SIZE // PLACES, y * IMAGE_SIZE // PLACES, SIZES[s],
                  float(score[number, s, y, x]))
        if not found or o.score >= ALIKE * found[0].score:
            found.append(o)
        for layer, size in zip(gain, SIZES):            # centres within it, or around it, are out
            reach = max(size, SIZES[s]) * PLACES // IMAGE_SIZE // 2
            rows = slice(max(y - reach, 0), y + reach + 1)
            layer[rows, max(x - reach, 0):x + reach + 1] = -1
    return found
