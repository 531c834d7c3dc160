"""Which objects are in a picture of the tiny world, where, and on which ground? A judge without a neural network.

The judge is told neither the prompt nor the model.
Which ground is it?  The plain colour nearest (in RGB) to the median g of the pixels along the border.

Which objects are there?  Sprite matching. Each glyph o, in each colour that it can have, in sizes s from 45 to 108 pixels, is laid on
the ground just found, at all places p. What is left of sprite and picture x without the ground is compared by its slopes, blurred by
about 2 pixels, within the sprite's box:

    T = alpha(o, s, p) · (glyph(o, s, p) - g),   D = x - g
    gain(o, s, p)  = ⟨∇D, ∇T⟩² / ‖∇T‖²                     what a faint or strong T explains of the picture at best
    score(o, s, p) = 2 ⟨∇D, ∇T⟩ / (‖∇D‖²_box + ‖∇T‖²)      at most 1, which only D = T reaches

The first object is the one that explains most; the next is the best whose box lies elsewhere; and so on, as long as it explains a
twelfth of what the first does, and its score, which says how sharp it is, reaches 0.6 of the first's. Slopes, because a blob of the
right colour has most of an object's brightness, but few of its slopes. All places at once are one product of Fourier coefficients, up to 15 waves a side.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .glyphs import COLOURS, OBJECTS, RECOLOURABLE, stamp
from .grounds import PLAIN, SIDE

THRESHOLD = 0.7                                        # the score of a sharp object
SIZES = (45, 50, 56, 62, 70, 78, 87, 97, 108)          # of a sprite, in pixels: a step of an eighth
BORDER = 5                                             # pixels that tell the ground: few objects reach them
GRID = 32                                              # places along a side: every fourth pixel
FAINT, ALIKE = 0.08, 0.6                               # of what the first object explains, and of its score: less is no object
MOST = 6                                               # objects that are looked for
_FY, _FX = np.arange(-15, 16), np.arange(16)           # of a real picture: 31 waves from top to bottom, 16 from left to right
_KX, _KY = (torch.from_numpy(np.float32(k)) for k in np.meshgrid(_FX, _FY))
_SQUARE = _KX**2 + _KY**2                              # slopes of slopes
_BLUR = torch.exp(-_SQUARE / 200)
_EDGE = np.pad(np.zeros((SIDE - 2 * BORDER,) * 2, bool), BORDER, constant_values=True)


@dataclass(frozen=True)
class Found:
    """An object that the judge sees: word, colour (None: as the glyph is), centre and size in pixels, score."""
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
        """Whether the picture is as near to the sprite as only a clean, undistorted painting is."""
        return self.score >= THRESHOLD


@lru_cache(maxsize=1)
def variants() -> list[tuple[str, str | None]]:
    """Every object as it is, and each that can be recoloured in all other colours."""
    return [(name, None) for name in OBJECTS] + [(name, colour) for name in RECOLOURABLE for colour in COLOURS
                                                 if colour != RECOLOURABLE[name]]


def waves(x: Tensor) -> Tensor:
    """(..., 128, 128) -> the Fourier coefficients of its blur: (..., 31, 16)."""
    return torch.fft.rfft2(x)[..., _FY, :len(_FX)] * _BLUR


def places(coefficients: Tensor) -> Tensor:
    """(..., 31, 16) -> the real picture at every fourth pixel: (..., 32, 32)."""
    full = coefficients.new_zeros(*coefficients.shape[:-2], GRID, GRID // 2 + 1)
    full[..., _FY, :len(_FX)] = coefficients
    return torch.fft.irfft2(full, s=(GRID, GRID))


@lru_cache(maxsize=1)
def sprites() -> Tensor:
    """Slopes of every variant in every size, in the middle of a picture: red, green, blue (times alpha), alpha: (V, S, 4, 31, 16).

    Raises FileNotFoundError without the font."""
    bank = []
    for name, colour in variants():
        canvas = np.zeros((len(SIZES), 4, SIDE, SIDE), np.float32)
        for layer, size in zip(canvas, SIZES):
            rgba, edge = np.moveaxis(np.float32(stamp(name, colour, size)) / 255, -1, 0), (SIDE - size) // 2
            layer[:, edge:edge + size, edge:edge + size] = np.concatenate([rgba[:3] * rgba[3:], rgba[3:]])
        bank.append(waves(torch.from_numpy(canvas)))
    return torch.stack(bank)


def judge(pictures: np.ndarray) -> list[Verdict]:
    """Look at pictures (n, 128, 128, 3) uint8, one by one."""
    return [_judge(picture) for picture in pictures]


def _energy(coefficients: Tensor) -> Tensor:
    """(..., C, 31, 16) -> the square of the slopes at each place, summed over channels: (..., 32, 32)."""
    return sum(places(1j * k * coefficients).square().sum(-3) for k in (_KX, _KY))


@torch.no_grad()
def _judge(picture: np.ndarray) -> Verdict:
    x = np.float32(picture) / 255
    g = np.median(x[_EDGE], axis=0)
    d, bank = waves(torch.from_numpy(np.moveaxis(x - g, -1, 0).copy())), sprites()
    t = bank[:, :, :3] - torch.from_numpy(g)[:, None, None] * bank[:, :, 3:]                    # (V, S, 3, 31, 16)
    inner = places(_SQUARE * (t.conj() * d).sum(2)).roll((GRID // 2, GRID // 2), (-2, -1))    # (V, S, 32, 32), by centre
    weight = _SQUARE * (1 + (_KX > 0)) / GRID**2                                                # Parseval: a wave and its conjugate
    own = (weight * t.abs().square()).sum((2, 3, 4))                                            # (V, S)
    slopes = _energy(d)[None, None]
    boxes = torch.cat([_box_sum(slopes, (size + 8) * GRID // SIDE)[0] for size in SIZES])       # (S, 32, 32)
    score = 2 * inner / (boxes + own[..., None, None])                                          # (V, S, 32, 32)
    gain, best = (inner.clamp(min=0).square() / own[..., None, None]).max(0)                    # (S, 32, 32)
    for layer, size in zip(gain, SIZES):               # a box lies within the picture, but for a few pixels
        edge = max(size * GRID // SIDE // 2 - 1, 1)
        layer[:edge], layer[-edge:], layer[:, :edge], layer[:, -edge:] = -1, -1, -1, -1
    found: list[Found] = []
    most = float(gain.max())
    while len(found) < MOST and gain.max() >= FAINT * most:
        s, y, x = np.unravel_index(int(gain.argmax()), gain.shape)
        o = Found(*variants()[best[s, y, x]], int(x) * SIDE // GRID, int(y) * SIDE // GRID, SIZES[s], float(score[best[s, y, x], s, y, x]))
        found += [o] if not found or o.score >= ALIKE * found[0].score else []
        for layer, size in zip(gain, SIZES):           # what has its middle within it, or it within itself, is out
            reach = max(size, SIZES[s]) * GRID // SIDE // 2
            layer[max(y - reach, 0):y + reach + 1, max(x - reach, 0):x + reach + 1] = -1
    ground = min(PLAIN, key=lambda name: np.square(np.float32(PLAIN[name]) / 255 - g).sum())
    return Verdict(ground, tuple(found))


def _box_sum(x: Tensor, side: int) -> Tensor:
    """Sums over squares of an odd number of places about each place: (B, C, H, W), zeros beyond the edge."""
    side = side // 2 * 2 + 1
    return F.avg_pool2d(x, side, stride=1, padding=side // 2, count_include_pad=True) * side**2
