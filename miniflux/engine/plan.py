"""How much memory each way of running a model takes, before anything is loaded.

The model lies on the meta device, where its tensors have shapes but no elements. It is changed as
it would be, and its bytes are counted. What the networks hold while they compute is proportional to
the tokens, the pixels and the text, by factors that were measured.

`load(..., fit=True)` takes the first way that fits and changes no image: everything on the device,
else parts in turn (`engine/offload.py`). Quantising changes images a little, so `miniflux plan`
only proposes it.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from ..checkpoints.quantized import QuantizedLinear
from ..flux import Flux
from . import offload
from .modulation import LIMIT, precompute_modulation
from .quantize import quantize

WAYS = ("whole", *offload.MODES)           # the faster ones first
FORMS = ("int8", "nf4")
GIB = 2**30
MARGIN = 1.1                               # for the allocator's losses and the libraries
# Elements that are held at most while a network computes, measured.
TRANSFORMER = 18                           # for each token and channel, in its dtype
ROTATION = 5                               # for each token and channel, in float32
DECODER = 3                                # for each pixel and channel of the decoder's last stage
T5_TOKEN = 15                              # for each token and channel of T5
T5_SCORE = 5                               # for each score of its attention
DEQUANTIZING = 8                           # bytes for each element of the weight being dequantized


@dataclass(frozen=True)
class Way:
    """A way to run a model, and the bytes it takes at most.

    mode: "whole", or a mode of `offload`.
    form: the quantisation, or None.
    device, memory: bytes on the device, and in the computer's memory."""

    mode: str
    form: str | None
    device: int
    memory: int

    def fits(self, device: float, memory: float) -> bool:
        return MARGIN * self.device <= device and self.memory <= memory


def expect(flux: Flux, mode: str, form: str | None, width: int, height: int, num_images: int = 1,
           steps: int = 28, text_tokens: int | None = None, prefetch: bool = True) -> Way:
    """What running a model on the meta device in this way would take at most.

    mode, form: see `Way`. width, height: pixels. num_images: in one batch. steps: of a call.
    text_tokens: T5 tokens; default: the model's.
    prefetch: whether the next part comes while one is computed."""
    flux = quantize(flux, form) if form else flux
    text_tokens = flux.config.max_text_tokens if text_tokens is None else text_tokens
    whole = mode == "whole"
    flux = flux if whole else precompute_modulation(flux)
    modulation = dict(enumerate(getattr(flux.mmdit, "precomputed", ())))
    networks = {name: each for name, each in vars(flux).items() if isinstance(each, nn.Module)}
    networks |= modulation
    networks |= {f"adapter {i}": adapter for i, adapter in enumerate(flux.ip_adapters)}
    ahead = precomputed_bytes(flux, modulation.values(), steps * num_images)
    working = dict.fromkeys(networks, 0) | activations(flux, width, height, num_images, text_tokens)
    working["mmdit"] += ahead

    size, turn, staying, stages = {}, {}, {}, {}
    for name, network in networks.items():
        working[name] += dequantized_bytes(network)
        size[name] = nbytes(network)
        turn[name] = size[name] if whole else at_once(network, mode, prefetch)
        staying[name] = size[name] if whole else size[name] - sum(parts(network, mode))
        stages[name] = working[name] + (0 if whole else turn[name])
    for name in modulation:                # it comes while the transformer has its turn
        stages[name] = turn[name] + turn["mmdit"] + ahead
    device = sum(staying.values()) + max(stages.values())
    memory = {"whole": 0, "disk": max(turn.values())}.get(mode, sum(size.values()))
    return Way(mode, form, device, memory)


def precomputed_bytes(flux: Flux, modulation: Iterable[nn.Module], vectors: int) -> int:
    """Bytes of the modulation that is computed ahead for so many vectors (steps x images)."""
    width = 0
    for layers in modulation:
        for layer in layers.layers.modules():
            if isinstance(layer, nn.Linear):
                width += layer.out_features
    return min(LIMIT, vectors) * width * itemsize(flux)


def dequantized_bytes(network: nn.Module) -> int:
    """Bytes that dequantizing its largest weight takes."""
    sizes = [layer.in_features * layer.out_features for layer in network.modules()
             if isinstance(layer, QuantizedLinear)]
    return DEQUANTIZING * max(sizes, default=0)


def nbytes(module: nn.Module) -> int:
    """Bytes of all its tensors."""
    return sum(tensor.nbytes for *_, tensor in offload.slots(module))


def itemsize(flux: Flux) -> int:
    """Bytes of an element that the transformer computes with."""
    return flux.mmdit.img_in.weight.element_size()


def parts(network: nn.Module, mode: str) -> list[int]:
    """The bytes of each of its parts that take turns on the device."""
    sizes = []
    for slots in offload.movable(network, mode):
        sizes.append(sum(tensor.nbytes for *_, tensor in slots))
    return sizes


def at_once(network: nn.Module, mode: str, prefetch: bool) -> int:
    """The bytes on the device at most: of one part, and with prefetching of the next one too."""
    sizes = parts(network, mode)
    if prefetch and mode != "model":
        sizes += [a + b for a, b in pairwise(sizes)]
    return max(sizes, default=0)


def activations(flux: Flux, width: int, height: int, num_images: int, text_tokens: int
                ) -> dict[str, int]:
    """Network -> bytes that it holds beside its weights while it computes."""
    item = itemsize(flux)
    tokens = text_tokens + (width // 16) * (height // 16)
    channels = flux.mmdit.config.hidden_size
    found = {"mmdit": (TRANSFORMER * item + ROTATION * 4) * num_images * tokens * channels}
    if flux.autoencoder:
        sizes = flux.autoencoder.config
        channels = sizes.ch * sizes.ch_mult[:2][-1]
        found["autoencoder"] = DECODER * item * num_images * width * height * channels
    if flux.t5:
        sizes = flux.t5.config
        each = T5_TOKEN * sizes.d_model + T5_SCORE * sizes.num_heads * text_tokens
        found["t5"] = item * text_tokens * each
    return found


# -------------------------------------------------------------------------------------- deciding


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", lines)[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def modes(device: torch.device) -> tuple[str, ...]:
    """The modes that make sense on a device: on the CPU, weights can come only from the disk."""
    return ("whole", "disk") if device.type == "cpu" else WAYS


def first_that_fits(flux: Flux, device: torch.device) -> Way:
    """The first way in which the model fits for an image of its own size; else the last one."""
    here, memory = free_memory(device), free_memory(torch.device("cpu"))
    size = flux.config.size
    for mode in modes(device):
        way = expect(flux, mode, None, size, size, prefetch=device.type == "cuda")
        if way.fits(here, memory):
            break
    return way
