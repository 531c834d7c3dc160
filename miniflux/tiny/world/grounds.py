"""The grounds of the world: twelve plain colours and seven small landscapes.

    >>> render_ground("sea", seed=3).shape
    (128, 128, 3)
"""

import numpy as np

IMAGE_SIZE = 128                         # width and height of every image, in pixels
_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)

PLAIN = dict(
    red=(214, 52, 48), orange=(243, 142, 48), yellow=(248, 220, 84), green=(76, 166, 82),
    blue=(62, 104, 208), purple=(136, 78, 176), pink=(246, 160, 192), brown=(126, 82, 52),
    black=(28, 28, 30), white=(246, 246, 246), gray=(146, 148, 152), cyan=(84, 208, 212),
)
SCENIC = dict(                           # ground: (its words in a caption, its plain colour)
    sea=("in the sea", "blue"), sky=("in the sky", "cyan"), grass=("on the grass", "green"),
    night=("at night", "black"), snow=("in the snow", "white"),
    desert=("in the desert", "yellow"), room=("in a room", "brown"),
)
GROUNDS = tuple(PLAIN) + tuple(SCENIC)   # the order counts, as that of `ALL_OBJECTS`


def render_ground(ground: str, seed: int) -> np.ndarray:
    """The ground alone: (128, 128, 3) float32 in 0..255. The seed moves its shade, horizon, waves,
    clouds and stars."""
    noise = np.random.default_rng(seed)
    if ground in PLAIN:
        colour = np.float32(PLAIN[ground] + noise.uniform(-9, 9, 3))
        return np.tile(colour, (IMAGE_SIZE, IMAGE_SIZE, 1))
    phase = noise.uniform(0, 6.28)
    horizon = noise.uniform(30, 46)
    return _LANDSCAPES[ground](noise, phase, horizon)


def _fade(upper: tuple, lower: tuple, top: int = 0, bottom: int = IMAGE_SIZE) -> np.ndarray:
    """A vertical gradient between two colours from row `top` to row `bottom`: (128, 128, 3)."""
    t = ((_Y - top) / (bottom - top)).clip(0, 1)[..., None]
    return np.float32(upper) * (1 - t) + np.float32(lower) * t


def _hills(phase: float, horizon: float) -> np.ndarray:
    return horizon + 4 * np.sin(_X * 0.05 + phase)


def _sea(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    waves = np.sin(_X * 0.22 + _Y * 0.9 + phase) * np.sin(_Y * 0.45 + phase) > 0.7
    water = _fade((70, 150, 214), (16, 72, 150), 30) + 26 * waves[..., None]
    sky = _fade((186, 226, 250), (222, 240, 250), 0, 46)
    return np.where((_Y < horizon)[..., None], sky, water)


def _sky(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    image = _fade((72, 156, 236), (190, 226, 250))
    for x, y, r in noise.uniform((0, 8, 9), (IMAGE_SIZE, 120, 17), (4, 3)):
        for dx, s in ((-0.9, 0.7), (0, 1), (0.9, 0.65)):        # a cloud is three ellipses
            ellipse = ((_X - x - dx * r) / (s * r)) ** 2 + ((_Y - y) / (0.6 * s * r)) ** 2 < 1
            image[ellipse] = (246, 250, 254)
    return image


def _grass(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    blades = 9 * np.sin(_X * 1.7 + 3 * np.sin(_Y * 0.5 + phase)) * np.sin(_Y * 0.6 + _X * 0.3)
    meadow = _fade((128, 200, 84), (64, 148, 52), 30) + blades[..., None]
    sky = _fade((172, 220, 250), (220, 240, 252), 0, 46)
    return np.where((_Y < _hills(phase, horizon))[..., None], sky, meadow)


def _desert(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    image = _fade((250, 214, 150), (253, 236, 196), 0, 56)
    dunes = ((0, (236, 190, 116)), (26, (224, 170, 92)), (54, (210, 152, 76)))
    for lower, colour in dunes:
        image[_Y > _hills(phase, horizon) + lower + 4 * np.sin(_X * 0.04 + lower)] = colour
    return image


def _room(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    wall = np.float32((232, 214, 182) + noise.uniform(-12, 12, 3))
    floor = np.float32((166, 116, 74) + noise.uniform(-12, 12, 3))
    line = 82 + noise.uniform(-6, 6)
    left = noise.choice((10, 86))
    lengthwise = (_X + (_X - 64) * (_Y - line) / 60) % 26 < 1.6         # planks in perspective
    planks = 10 * lengthwise + 8 * ((_Y - line) % 15 < 1.5)
    papered = wall - 8 * (_X % 16 < 8)[..., None]
    image = np.where((_Y < line)[..., None], papered, floor - planks[..., None])
    image[(_Y > line - 4) & (_Y < line)] = (250, 246, 238)              # the skirting board
    x, y = _X - left, _Y - 12
    frame = (x > 0) & (x < 32) & (y > 0) & (y < 38)                     # a window with four panes
    panes = (x > 3) & (x < 29) & (y > 3) & (y < 35)
    panes &= (np.abs(x - 16) > 1.5) & (np.abs(y - 19) > 1.5)
    image[frame] = (250, 246, 238)
    image[panes] = (158, 212, 244)
    return image


def _night(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    return _sprinkle(noise, _fade((10, 12, 38), (36, 38, 84)), (250, 248, 232))


def _snow(noise: np.random.Generator, phase: float, horizon: float) -> np.ndarray:
    snow = _fade((250, 252, 255), (222, 232, 244), 40)
    sky = _fade((150, 178, 206), (196, 214, 230), 0, 56)
    image = np.where((_Y < _hills(phase, horizon) + 12)[..., None], sky, snow)
    return _sprinkle(noise, image, (255, 255, 255))


def _sprinkle(noise: np.random.Generator, image: np.ndarray, colour: tuple) -> np.ndarray:
    """Stars or flakes, one or two pixels wide."""
    for x, y in noise.integers(1, IMAGE_SIZE - 2, (36, 2)):
        image[y:y + 1 + x % 2, x:x + 1 + x % 2] = colour
    return image


_LANDSCAPES = dict(sea=_sea, sky=_sky, grass=_grass, night=_night, snow=_snow, desert=_desert,
                   room=_room)
