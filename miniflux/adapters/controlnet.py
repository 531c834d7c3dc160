"""ControlNet in a call: further networks that correct every step by control images.

    net = load_controlnet("InstantX/FLUX.1-dev-Controlnet-Union")
    generate(flux, "a fox", controlnet=(net, "edges.png", 0.7, 0.0, 0.8, "canny"))

The network itself is in `networks/controlnet.py`. Seam: velocity -> velocity. Before each step the
nets are given the state; their residuals are added within the transformer, in both passes of true
CFG alike, as in diffusers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints import layouts
from ..checkpoints.hub import find_network
from ..checks import check_number, quote, to_number
from ..devices import default_dtype, find_device
from ..flux import Flux
from ..imaging.images import preprocess
from ..imaging.reading import ImageLike, read_images, size_of
from ..latents import encode
from ..networks.controlnet import ControlNet, assign
from ..prompt import Prompt
from ..sampling import Residuals, image_ids, patchify, repeat_to_batch, text_ids

# The kinds of control of InstantX's and Shakker's union nets.
MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low-quality": 6}


class Control(NamedTuple):
    """One ControlNet of a call. A plain tuple will do as well, and may leave out its last items."""

    net: ControlNet
    image: ImageLike | list[ImageLike]  # the control image (edges, depths, ...), or one per prompt
    scale: float = 1.0                  # of the residuals, in [-100, 100]
    start: float = 0.0                  # the part of the steps in which the net acts, in [0, 1]
    end: float = 1.0
    mode: int | str | None = None       # the kind of control for a union net: a number or a name


Controls = Control | tuple | Sequence[Control | tuple]


def load_controlnet(source: str | Path, *, device: torch.device | str | None = None,
                    dtype: torch.dtype | None = None) -> ControlNet:
    """Loads a ControlNet.

    source: a safetensors file, a folder, a Hub id or a shipped name; with the tensor names of
        InstantX, Shakker or XLabs.
    device, dtype: as in `load`.

    Raises FileNotFoundError for what does not exist, ValueError for what is not a FLUX ControlNet.
    """
    device = find_device(device)
    path = find_network(source, "ControlNet")
    return layouts.load_controlnet(path, device, dtype or default_dtype(device))


# ------------------------------------------------------------------------------------------ checks


def read_controls(flux: Flux, controlnet: Controls | None) -> list[Control]:
    """The ControlNets of a call, checked against the model, with their images read."""
    if controlnet is None:
        return []
    given = [controlnet] if isinstance(controlnet, tuple) else list(controlnet)
    return [read_control(flux, control) for control in given]


def read_control(flux: Flux, given: Control | tuple) -> Control:
    """One ControlNet of a call, checked, with its mode as a number."""
    is_control = isinstance(given, tuple) and 2 <= len(given) <= 6
    if not is_control or not isinstance(given[0], ControlNet):
        raise ValueError(f"controlnet is {quote(given)}: expected (net, image, scale, start, end, "
                         "mode), with a net of load_controlnet, or a list of such tuples")
    control = Control(*given)
    check_fits(control.net, flux)
    start = check_number("the start of a ControlNet", control.start, 0, 1)
    return control._replace(
        image=read_images(control.image, "control image"),
        scale=check_number("the scale of a ControlNet", control.scale, -100, 100),
        start=start,
        end=check_number("the end of a ControlNet", control.end, start, 1),
        mode=read_mode(control.net, control.mode))


def check_fits(net: ControlNet, flux: Flux) -> None:
    for field in ("hidden_size", "in_channels", "context_in_dim", "vec_in_dim"):
        have, need = getattr(net.config, field), getattr(flux.mmdit.config, field)
        if have != need:
            raise ValueError(f"this ControlNet was made for another model: its {field} is {have}, "
                             f"that of {flux.config.name} is {need}")


def read_mode(net: ControlNet, mode: int | str | None) -> int | None:
    """The kind of control as a number; None for a net that is not a union of several."""
    modes = net.config.modes
    if not modes:
        if mode is not None:
            raise ValueError(f"the mode is {quote(mode)}, but this ControlNet has one kind of "
                             "control only: leave the mode out")
        return None
    number = MODES.get(mode) if isinstance(mode, str) else to_number(mode, whole=True)
    if number is None or not 0 <= number < modes:
        raise ValueError(f"the mode is {quote(mode)}: this union net needs a number below {modes}, "
                         f"or one of {', '.join(MODES)}")
    return number


def control_size(controls: list[Control]) -> tuple[int, int]:
    """The (width, height) of the first control image, whose shape the result has by default."""
    return size_of(controls[0].image[0])


# --------------------------------------------------------------------------------------- residuals


def window(ts: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """The interval low < t <= high of times at which a net acts.

    ts: the times of the call, falling from noise to data.
    start, end: in [0, 1], as parts of the steps. Only steps that lie within [start, end] as a whole
        count, as in diffusers; step i covers the times ts[i+1] < t <= ts[i].

    >>> window([1.0, 0.8, 0.5, 0.2, 0.0], 0.25, 0.75)       # the second and the third of four steps
    (0.2, 0.8)

    Note: an interval, not a list of the times in ts, as a sampler may evaluate between them."""
    steps = len(ts) - 1
    active = [i for i in range(steps) if i / steps >= start and (i + 1) / steps <= end]
    if not active:
        return 1.0, 0.0                                     # no time lies in it
    return ts[active[-1] + 1], ts[active[0]]


def control_tokens(flux: Flux, control: Control, width: int, height: int) -> Tensor:
    """The control images as tokens (n, N, in_channels): their latents, or XLabs' hint of them."""
    net = control.net
    images = preprocess(control.image, width, height)                            # (n, 3, H, W)
    if net.config.hint:
        z = net.input_hint_block(images.to(net.img_in.weight))                  # (n, 16, h, w)
    else:
        z = encode(flux, images)                                                # (n, 16, h, w)
    return patchify(z).to(net.img_in.weight)                                    # (n, N, 64)


def residuals_of(flux: Flux, controls: Sequence[Control], text: Prompt, ts: Sequence[float],
                 width: int, height: int, guidance: float) -> Residuals:
    """The sum of what the nets add to the transformer for these prompts.

    text: the encoded prompts.
    ts: the times of the call.
    width, height: of the image, in pixels.
    guidance: for nets that have an embedding of it.

    Returns a function of the state x (B, 16, h, w) and the time t. Its result is for each block,
    double ones first, a residual (B, N, hidden) or None."""
    nets = [residuals_of_net(flux, control, text, ts, width, height, guidance)
            for control in controls]
    blocks = flux.mmdit.config.depth + flux.mmdit.config.depth_single_blocks

    def residuals(x: Tensor, t: float) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * blocks
        for net in nets:
            total = [add(a, b) for a, b in zip(total, net(x, t) or [None] * blocks)]
        return total

    return residuals


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return b
    return a if b is None else a + b


def residuals_of_net(flux: Flux, control: Control, text: Prompt, ts: Sequence[float], width: int,
                     height: int, guidance: float
                     ) -> Callable[[Tensor, float], list[Tensor | None] | None]:
    """The same of one net: None outside its window and for a scale of 0."""
    net, config = control.net, flux.mmdit.config
    low, high = window(ts, control.start, control.end)
    weight = net.img_in.weight                              # each net has its own device and dtype
    tokens = repeat_to_batch(control_tokens(flux, control, width, height), text.pooled)
    txt, pooled = text.txt.to(weight), text.pooled.to(weight)
    img_ids = image_ids(height // 8, width // 8).to(weight.device)
    txt_ids = text_ids(txt.shape[1]).to(weight.device)

    def residuals(x: Tensor, t: float) -> list[Tensor | None] | None:
        if not low < t <= high or not control.scale:
            return None
        time = torch.full((len(x),), t, dtype=weight.dtype, device=weight.device)   # (B,)
        guidance_vec = torch.full_like(time, guidance) if net.config.guidance_embed else None
        img = patchify(x.to(weight))                                            # (B, N, 64)
        doubles, singles = net(img, tokens, control.mode, txt, pooled, time, guidance_vec,
                               img_ids, txt_ids)
        doubles = [(control.scale * residual).to(text.txt) for residual in doubles]
        singles = [(control.scale * residual).to(text.txt) for residual in singles]
        return (assign(doubles, config.depth, repeat=net.config.hint)
                + assign(singles, config.depth_single_blocks, repeat=False))

    return residuals
