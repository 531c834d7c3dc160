"""Figures for the course: grids of images, heat maps on images, and plots in one style.

    show([[image, image], [other, other]], across=["seed 0", "seed 1"], down=["dev", "schnell"])
    show([overlay(image, weights)])                     # where the weights (h, w) lie on the image
    ax = plot("time t", "loss"); ax.plot(ts, losses, color=BLUE)

An image is a PIL image, a tensor (3, H, W) or an array (H, W, 3), both in [0, 1]; a tensor or array
(H, W) is drawn in the colours of a map. The colours are Okabe and Ito's, which the colour-blind can
tell apart. Needs matplotlib, which comes with `pip install ".[tutorials]"`.
"""

from collections.abc import Sequence

import numpy as np

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, GREY = "#56B4E9", "#E69F00", "#7F7F7F"
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 2,
         "legend.frameon": False, "figure.dpi": 100, "savefig.facecolor": "white"}
WIDTH = 8.0                # inches: 800 pixels, and readable at half of it


def to_array(image) -> np.ndarray:
    """(H, W, 3) in [0, 1], or (H, W) as it is."""
    if hasattr(image, "detach"):
        image = image.detach().float().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    array = np.asarray(image)
    array = array / 255 if array.dtype == np.uint8 else array
    return array if array.ndim == 2 else array.clip(0, 1)


def show(images: Sequence, across: Sequence[str] = (), down: Sequence[str] = (),
         colours: str = "magma", limits: tuple[float, float] | None = None,
         height: float | None = None) -> None:
    """Draws a grid.

    images: one row, or a list of rows. across: a title for each column, or for each image in
    reading order. down: a label for each row. colours, limits: the map and its ends for images (H,
    W); each is scaled by itself by default. height: of a row in inches; by default as wide as a
    column."""
    import matplotlib.pyplot as plt

    rows = [list(row) for row in images] if isinstance(images[0], (list, tuple)) else [list(images)]
    columns = max(map(len, rows))
    side = (WIDTH - (1.0 if down else 0.0)) / columns
    titled = len(rows) if len(across) > columns else 1                          # rows with titles
    lines = max((title.count("\n") + 1 for title in across), default=0)
    tall = (side if height is None else height) * len(rows) + 0.2 * (lines + bool(lines)) * titled
    plt.rcParams.update(STYLE)
    figure, grid = plt.subplots(len(rows), columns, squeeze=False, figsize=(WIDTH, tall),
                                layout="constrained")
    for r in range(len(rows)):
        for c in range(columns):
            ax = grid[r, c]
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
            if c < len(rows[r]):
                low, high = limits or (None, None)
                ax.imshow(to_array(rows[r][c]), cmap=colours, vmin=low, vmax=high)
            if r < titled and r * columns + c < len(across):
                ax.set_title(across[r * columns + c])
            if c == 0 and r < len(down):
                ax.set_ylabel(down[r], rotation=0, ha="right", va="center")


def overlay(image, weights, strength: float = 0.75) -> np.ndarray:
    """The image in grey with the weights (h, w) over it in colour, scaled to their own maximum."""
    from matplotlib import colormaps
    from PIL import Image

    picture = to_array(image)
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)                        # (H, W, 3)
    map_ = to_array(weights)
    map_ = (map_ - map_.min()) / max(float(map_.max() - map_.min()), 1e-12)
    size = picture.shape[1], picture.shape[0]
    large = Image.fromarray(np.float32(map_)).resize(size, Image.Resampling.BICUBIC)
    heat = np.asarray(large).clip(0, 1)                                         # (H, W)
    alpha = strength * np.sqrt(heat)[..., None]
    return (1 - alpha) * (0.5 + 0.5 * grey) + alpha * colormaps["magma"](heat)[..., :3]


def plot(x: str, y: str, title: str | None = None, height: float = 3.4, columns: int = 1):
    """Axes, or `columns` of them side by side, with labels; the axes share their scales."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, columns, figsize=(WIDTH, height), sharex=True, sharey=True,
                                layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.set_xlabel(x)
    axes[0, 0].set_ylabel(y)
    if title:
        figure.suptitle(title, fontsize=12)
    return axes[0, 0] if columns == 1 else axes[0]
