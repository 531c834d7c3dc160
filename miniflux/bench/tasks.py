"""The table `tasks`: a step of each task beside one of generate."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from PIL import Image

from ..control import control
from ..fill import fill
from ..flux import Flux
from ..generate import generate
from ..image_to_image import image_to_image
from ..inpaint import inpaint
from ..kontext_edit import kontext_edit
from ..loading import load
from ..networks.mmdit import MMDiT
from .measuring import PROMPT, medians

FEW, MANY = 1, 15                      # steps of two runs, whose difference is the time of steps


def widened(flux: Flux, times: int) -> Flux:
    """The model with `times` as many input channels, and random weights."""
    torch.manual_seed(0)
    config = flux.mmdit.config
    mmdit = MMDiT(replace(config, in_channels=times * config.out_channels)).eval()
    for p in mmdit.parameters():
        if p.ndim == 2:
            p.data = p.data.t().contiguous().t()            # stored by columns, as loading does
    return replace(flux, mmdit=mmdit)


def bench_tasks(source: str) -> None:
    """Each task on the model's architecture, at the model's size.

    Where a task needs other input channels, the weights are random."""
    flux = load(source, device="cpu")
    size = flux.config.size
    image = Image.effect_noise((size, size), 80).convert("RGB")
    mask = Image.new("L", (size, size), 255)
    control_flux, fill_flux = widened(flux, 2), widened(flux, 6)
    tasks: dict[str, Callable] = {
        "generate": partial(generate, flux, PROMPT),
        "image_to_image": partial(image_to_image, flux, PROMPT, image, strength=1.0),
        "inpaint": partial(inpaint, flux, PROMPT, image, mask, strength=1.0),
        "control (twice the channels)": partial(control, control_flux, PROMPT, image),
        "fill (six times the channels)": partial(fill, fill_flux, PROMPT, image, mask),
        "kontext_edit (twice the tokens)": partial(kontext_edit, flux, PROMPT, image),
    }
    calls = []
    for task in tasks.values():
        for steps in (FEW, MANY):
            calls.append(partial(task, steps=steps, output="latents", progress=False))
    times = medians(*calls, runs=9)
    steps = [1e3 * (many - few) / (MANY - FEW) for few, many in zip(times[::2], times[1::2])]
    print(f"\n{'a step':36} {'miniflux':>12} {'/ generate':>12}")
    for name, ms in zip(tasks, steps):
        print(f"{name:36} {ms:9.1f} ms {ms / steps[0]:11.2f}x")
