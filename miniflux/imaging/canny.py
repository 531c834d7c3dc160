"""Canny's edge detector: thin, connected edges where the brightness changes most.

    miniflux canny photo.png --output edges.png

    gradient          how strongly and in which direction the brightness changes at each pixel
    thin              keep only the ridges of its strength: one pixel across the edge
    hysteresis        keep weak edges that are connected to a strong one

FLUX.1 Canny was trained on the edges of OpenCV's `cv2.Canny`. This follows its integer arithmetic.
Paper: J. Canny 1986, doi:10.1109/TPAMI.1986.4767851.
"""

import numpy as np
from PIL import Image

from ..checks import check_number
from ..command import Parser, command, say
from .images import as_pil
from .reading import ImageLike, read_image
from .saving import check_output, save


def canny(image: ImageLike, low: float = 50, high: float = 200) -> Image.Image:
    """White edges on black: an RGB image of the same size.

    image: a path, a PIL image, an array or a tensor.
    low, high: thresholds of the gradient |dx| + |dy| by 3x3 Sobel filters, from 0 to 2040. An edge
        begins above `high` and continues above `low`. Defaults: those of the original repository.

    Raises ValueError for anything that is no image or threshold."""
    low = check_number("the threshold low", low, 0, 1_000_000)
    high = check_number("the threshold high", high, 0, 1_000_000)
    low, high = sorted((int(low), int(high)))
    dx, dy, strength = gradient(np.asarray(as_pil(read_image(image)), np.int32))
    ridge = thin(dx, dy, strength)
    edges = hysteresis(ridge & (strength > low), ridge & (strength > high))
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(H, W, 3) -> dx, dy and |dx| + |dy|, each (H, W).

    Sobel's filters in the channel in which the change is strongest."""
    p = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]                     # (H, W+2, 3), smoothed down the columns
    columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]         # (H+2, W, 3), smoothed along the rows
    dx = rows[:, 2:] - rows[:, :-2]                         # (H, W, 3)
    dy = columns[2:] - columns[:-2]                         # (H, W, 3)
    strongest = (abs(dx) + abs(dy)).argmax(axis=2)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, axis=2)[..., 0] for d in (dx, dy))
    return dx, dy, abs(dx) + abs(dy)


def thin(dx: np.ndarray, dy: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Where the strength is a maximum along the gradient: (H, W) booleans.

    The gradient counts in four directions: 0°, 45°, 90° and 135°."""
    height, width = strength.shape
    s = np.pad(strength, 1)                                 # zero beyond the image

    def neighbour(down: int, right: int) -> np.ndarray:
        return s[1 + down:1 + down + height, 1 + right:1 + right + width]

    # Note: the tangents of 22.5° and of 67.5°, which is 2 more, as integers of 15 binary digits.
    # Ties are broken as in OpenCV.
    x = abs(dx).astype(np.int64)
    y = abs(dy).astype(np.int64) << 15
    flat = 13573 * x
    steep = flat + (x << 16)
    along_row = (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1))
    down_column = (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0))
    falling = (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1))     # dx, dy of one sign
    rising = (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(y < flat, along_row, np.where(y > steep, down_column, diagonal))


def hysteresis(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The strong pixels, and the weak ones connected to them by a chain of weak neighbours."""
    weak = np.pad(weak, 1).ravel()
    edges = np.pad(strong, 1)
    shape = edges.shape
    width = shape[1]
    edges = edges.ravel()
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    front = np.flatnonzero(edges)
    while len(front):
        near = (front[:, None] + around).ravel()
        front = np.unique(near[weak[near] & ~edges[near]])
        edges[front] = True
    return edges.reshape(shape)[1:-1, 1:-1]


@command
def main() -> None:
    parser = Parser(prog="miniflux canny",
                    description="Find the edges of an image: white on black.")
    parser.add_argument("image", help="the image to read")
    parser.add_argument("--output", default="canny.png",
                        help="the image to write (default canny.png)")
    parser.add_argument("--thresholds", type=float, nargs=2, default=(50, 200),
                        metavar=("LOW", "HIGH"), help="of the edges' strength (default 50 200)")
    args = parser.parse_args()
    try:
        output = check_output(args.output)
        edges = canny(args.image, *args.thresholds)
        save(edges, output, {"thresholds": args.thresholds})
        say(output)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
