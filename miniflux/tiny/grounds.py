"""The grounds of the tiny world: twelve plain colours and seven small landscapes.

    >>> paint_ground("sea", seed=3).shape
    (128, 128, 3)
"""
import numpy as np

SIDE = 128                                             # of every picture, in pixels
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)

PLAIN = dict(
    red=(214, 52, 48), orange=(243, 142, 48), yellow=(248, 220, 84), green=(76, 166, 82), blue=(62, 104, 208),
    purple=(136, 78, 176), pink=(246, 160, 192), brown=(126, 82, 52), black=(28, 28, 30), white=(246, 246, 246),
    gray=(146, 148, 152), cyan=(84, 208, 212),
)
SCENIC = dict(                                         # scenic ground: (how the caption says it, the plain colour it resembles)
    sea=("in the sea", "blue"), sky=("in the sky", "cyan"), grass=("on the grass", "green"),
    night=("at night", "black"), snow=("in the snow", "white"), desert=("in the desert", "yellow"), room=("in a room", "brown"),
)
GROUNDS = tuple(PLAIN) + tuple(SCENIC)                 # the order counts, as that of `GLYPHS`


def _fade(upper: tuple, lower: tuple, top: int = 0, bottom: int = SIDE) -> np.ndarray:
    """A vertical gradient between two colours from row `top` to row `bottom`: (128, 128, 3)."""
    t = ((_Y - top) / (bottom - top)).clip(0, 1)[..., None]
    return np.float32(upper) * (1 - t) + np.float32(lower) * t


def paint_ground(ground: str, seed: int) -> np.ndarray:
    """The ground alone: (128, 128, 3) float32 in 0..255. The seed moves its shade, horizon, waves, clouds and stars."""
    noise = np.random.default_rng(seed)
    if ground in PLAIN:
        return np.tile(np.float32(PLAIN[ground] + noise.uniform(-9, 9, 3)), (SIDE, SIDE, 1))
    phase, horizon = noise.uniform(0, 6.28), noise.uniform(30, 46)
    edge = horizon + 4 * np.sin(_X * 0.05 + phase)     # of hills and dunes
    if ground == "sea":
        waves = np.sin(_X * 0.22 + _Y * 0.9 + phase) * np.sin(_Y * 0.45 + phase) > 0.7
        picture = _fade((70, 150, 214), (16, 72, 150), 30) + 26 * waves[..., None]
        picture = np.where((_Y < horizon)[..., None], _fade((186, 226, 250), (222, 240, 250), 0, 46), picture)
    elif ground == "sky":
        picture = _fade((72, 156, 236), (190, 226, 250))
        for x, y, r in noise.uniform((0, 8, 9), (SIDE, 120, 17), (4, 3)):
            for dx, s in ((-0.9, 0.7), (0, 1), (0.9, 0.65)):                # a cloud is three ellipses
                picture[((_X - x - dx * r) / (s * r)) ** 2 + ((_Y - y) / (0.6 * s * r)) ** 2 < 1] = (246, 250, 254)
    elif ground == "grass":
        blades = 9 * np.sin(_X * 1.7 + 3 * np.sin(_Y * 0.5 + phase)) * np.sin(_Y * 0.6 + _X * 0.3)
        picture = _fade((128, 200, 84), (64, 148, 52), 30) + blades[..., None]
        picture = np.where((_Y < edge)[..., None], _fade((172, 220, 250), (220, 240, 252), 0, 46), picture)
    elif ground == "desert":
        picture = _fade((250, 214, 150), (253, 236, 196), 0, 56)
        for lower, colour in ((0, (236, 190, 116)), (26, (224, 170, 92)), (54, (210, 152, 76))):
            picture[_Y > edge + lower + 4 * np.sin(_X * 0.04 + lower)] = colour
    elif ground == "room":
        wall, floor = np.float32((232, 214, 182) + noise.uniform(-12, 12, 3)), np.float32((166, 116, 74) + noise.uniform(-12, 12, 3))
        line, left = 82 + noise.uniform(-6, 6), noise.choice((10, 86))
        planks = 10 * ((_X + (_X - 64) * (_Y - line) / 60) % 26 < 1.6) + 8 * ((_Y - line) % 15 < 1.5)       # in perspective
        picture = np.where((_Y < line)[..., None], wall - 8 * (_X % 16 < 8)[..., None], floor - planks[..., None])
        picture[(_Y > line - 4) & (_Y < line)] = (250, 246, 238)            # the skirting board
        x, y = _X - left, _Y - 12
        picture[(x > 0) & (x < 32) & (y > 0) & (y < 38)] = (250, 246, 238)  # a window with four panes
        picture[(x > 3) & (x < 29) & (y > 3) & (y < 35) & (np.abs(x - 16) > 1.5) & (np.abs(y - 19) > 1.5)] = (158, 212, 244)
    elif ground == "night":
        picture = _fade((10, 12, 38), (36, 38, 84))
    else:                                              # snow
        picture = _fade((250, 252, 255), (222, 232, 244), 40)
        picture = np.where((_Y < edge + 12)[..., None], _fade((150, 178, 206), (196, 214, 230), 0, 56), picture)
    if ground in ("night", "snow"):                    # stars and flakes, one or two pixels wide
        for x, y in noise.integers(1, SIDE - 2, (36, 2)):
            picture[y:y + 1 + x % 2, x:x + 1 + x % 2] = (250, 248, 232) if ground == "night" else 255
    return picture
