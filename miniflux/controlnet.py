"""ControlNet in a call: further networks that steer every step by control pictures.

    net = load_controlnet("InstantX/FLUX.1-dev-Controlnet-Union")
    generate(flux, "a fox", controlnet=(net, "edges.png", 0.7, 0.0, 0.8, "canny"))

The network itself is in `networks/controlnet.py`. The seam is velocity -> velocity: before each step the nets look at the state, and
what they say is added within the transformer, to both passes of true CFG alike, as diffusers does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoints import layouts
from .checkpoints.hub import find_network
from .checks import check_number, quote, to_number
from .devices import default_dtype, find_device
from .flux import Flux
from .imaging.images import Picture, fit, read_pictures, size_of
from .latents import encode
from .networks.controlnet import ControlNet, assign
from .prompt import Prompt
from .sampling import Residuals, image_ids, patchify, repeat_to_batch, text_ids

# The kinds of control of InstantX's and Shakker's union nets.
MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low-quality": 6}


class Control(NamedTuple):
    """One ControlNet of a call. Plain tuples do as well, and may end early.

    image: the control picture (edges, depths, ...), or a list of them, one for each prompt. scale: how strongly it acts. start,
    end: the part of the steps in which it acts, in [0, 1]. mode: the kind of control for a union net, by number or by name."""

    net: ControlNet
    image: Picture | list[Picture]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | str | None = None


Controls = Control | tuple | Sequence[Control | tuple]


def load_controlnet(source: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ControlNet:
    """A ControlNet from a safetensors file, a folder, a Hub id or a shipped name. Its tensors have InstantX's, Shakker's or XLabs' names.
    device, dtype: as `load`.

    Raises FileNotFoundError for what is not there, ValueError for what is not a FLUX ControlNet."""
    device = find_device(device)
    return layouts.load_controlnet(find_network(source, "ControlNet"), device, dtype or default_dtype(device))


def read_controls(flux: Flux, controlnet: Controls | None) -> list[Control]:
    """The ControlNets of a call, checked against the model, their pictures read and their modes as numbers."""
    given = [] if controlnet is None else [controlnet] if isinstance(controlnet, tuple) else list(controlnet)
    return [read_control(flux, one) for one in given]


def read_control(flux: Flux, given: Control | tuple) -> Control:
    if not isinstance(given, tuple) or not 2 <= len(given) <= 6 or not isinstance(given[0], ControlNet):
        raise ValueError(f"controlnet is {quote(given)}: expected (net, image, scale, start, end, mode), with a net of load_controlnet, "
                         "or a list of such tuples")
    net, image, scale, start, end, mode = Control(*given)
    for field in ("hidden_size", "in_channels", "context_in_dim", "vec_in_dim"):
        if (have := getattr(net.config, field)) != (need := getattr(flux.mmdit.config, field)):
            raise ValueError(f"this ControlNet was made for another model: its {field} is {have}, that of {flux.config.name} is {need}")
    scale = check_number("the scale of a ControlNet", scale, -100, 100)
    start = check_number("the start of a ControlNet", start, 0, 1)
    end = check_number("the end of a ControlNet", end, start, 1)
    number = MODES.get(mode) if isinstance(mode, str) else to_number(mode, whole=True)
    if net.config.modes and (number is None or not 0 <= number < net.config.modes):
        raise ValueError(f"the mode is {quote(mode)}: this union net needs a number below {net.config.modes}, or one of {', '.join(MODES)}")
    if not net.config.modes and mode is not None:
        raise ValueError(f"the mode is {quote(mode)}, but this ControlNet knows one kind of control only: leave the mode out")
    return Control(net, read_pictures(image, "control image"), scale, start, end, number)


def control_size(controls: list[Control]) -> tuple[int, int]:
    """The (width, height) of the first control image, whose shape the result has by default."""
    return size_of(controls[0].image[0])


def control_tokens(flux: Flux, control: Control, width: int, height: int) -> Tensor:
    """The control picture as the net reads it: (n, N, in_channels)."""
    pictures, net = fit(control.image, width, height), control.net    # (n, 3, H, W)
    z = net.input_hint_block(pictures.to(net.img_in.weight)) if net.config.hint else encode(flux, pictures)
    return patchify(z).to(net.img_in.weight)                                    # (n, N, 64)


def residuals_of(flux: Flux, controls: Sequence[Control], text: Prompt, ts: Sequence[float],
                 width: int, height: int, guidance: float) -> Residuals:
    """What the nets add to the transformer for these prompts, at any state of the latents (B, 16, h, w) and time of `ts`."""
    tokens = [repeat_to_batch(control_tokens(flux, control, width, height), text.vec) for control in controls]
    steps, depth, depth_single = len(ts) - 1, flux.mmdit.config.depth, flux.mmdit.config.depth_single_blocks
    # Note: a net acts in the steps that lie within [start, end] as a whole.
    times = [{ts[i] for i in range(steps) if i / steps >= control.start and (i + 1) / steps <= control.end} for control in controls]
    # Each net has a device and a dtype of its own.
    prompts = [(text.txt.to(net.img_in.weight), text.vec.to(net.img_in.weight)) for net, *_ in controls]
    ids = [[ids.to(net.img_in.weight.device) for ids in (image_ids(height // 8, width // 8), text_ids(text.txt.shape[1]))]
           for net, *_ in controls]

    def residuals(x: Tensor, t: float) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * (depth + depth_single)
        for (net, _, scale, _, _, mode), control, prompt, positions, active in zip(controls, tokens, prompts, ids, times):
            if t not in active or not scale:
                continue
            weight = net.img_in.weight
            full = torch.full((2, len(x)), t, dtype=weight.dtype, device=weight.device)
            guidance_vec = full[1].fill_(guidance) if net.config.guidance_embed else None
            doubles, singles = net(patchify(x.to(weight)), control, mode, *prompt, full[0], guidance_vec, *positions)
            doubles, singles = ([(scale * residual).to(text.txt) for residual in group] for group in (doubles, singles))
            own = assign(doubles, depth, repeat=net.config.hint) + assign(singles, depth_single, repeat=False)
            total = [a if b is None else b if a is None else a + b for a, b in zip(total, own)]
        return total

    return residuals
