"""What fits: how much memory each way of running a model takes, before anything is loaded.

    python -m miniflux.plan --model dev --size 1024 --vram 12

The model is assembled without numbers, from the headers of its files (or from the official sizes where it is not on this machine),
changed as it would be, and its tensors are counted; what the networks hold while they compute is proportional to the tokens, the
pixels and the text, by factors that were measured. `load(..., fit=True)` takes the first way that fits and changes no picture: all on
the device, else the parts in turn (`engine/offload.py`). Quantising changes pictures a little, so it is only proposed.
"""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from .checkpoints.building import WithoutInitialisation
from .checkpoints.finding import shipped_models
from .checkpoints.formats import concat_on_disk, meta_tensors
from .checkpoints.hub import OFFICIAL, find_in_cache
from .checkpoints.quantized import QuantizedLinear
from .checks import check_number
from .command import command
from .devices import default_dtype, find_device
from .engine import offload
from .engine.modulation import LIMIT, precompute_modulation
from .engine.quantize import quantize
from .flux import Flux, FluxConfig
from .imaging.images import check_side, log
from .loading import assemble
from .networks.autoencoder import Autoencoder
from .networks.clip import CLIPText
from .networks.mmdit import MMDiT, MMDiTConfig
from .networks.siglip import ReduxEmbedder, SigLIP
from .networks.t5 import T5

WAYS = ("whole", *offload.MODES)           # the faster ones first
FORMS = ("int8", "nf4")
GIB = 2**30
MARGIN = 1.1                               # for what the allocator cannot use, and the libraries take
# Numbers that are held at most while a network computes, measured. For each token and channel of the transformer: in its dtype, and in
# float32 (where positions are turned). For each pixel of the decoded picture, and channel there at most. For each token and channel of
# T5, and for each score of its attention.
TRANSFORMER, TURNING, DECODER, T5_TOKEN, T5_SCORE = 18, 5, 3, 15, 5
UNPACKING = 8                              # bytes, while a packed weight is unpacked, for each of its numbers
# How the official transformers differ from dev's.
CONFIGS = {"schnell": dict(guidance_embed=False), "fill": dict(in_channels=384), "canny": dict(in_channels=128), "depth": dict(in_channels=128)}


@dataclass(frozen=True)
class Way:
    """A way to run a model, and the bytes it takes at most on the device and in the computer's memory."""

    mode: str
    form: str | None
    device: int
    memory: int

    def fits(self, device: float, memory: float) -> bool:
        return MARGIN * self.device <= device and self.memory <= memory


def without_numbers(source: str | Path, dtype: torch.dtype, transformer: str | Path | None = None) -> Flux:
    """The model on the meta device, where its tensors have shapes only; an official one that is not here in its official sizes."""
    if source in OFFICIAL and source not in shipped_models() and find_in_cache(OFFICIAL[source]) is None and transformer is None:
        with torch.device("meta"), WithoutInitialisation():
            mmdit = MMDiT(MMDiTConfig(**CONFIGS.get(source, {})))
            parts = [CLIPText(), T5(), mmdit, Autoencoder()]
            more = {"siglip": SigLIP(), "redux": ReduxEmbedder()} if source == "redux" else {}
        flux = Flux(None, None, *parts, FluxConfig(name=source), **more)
        return offload.change_networks(flux, lambda network: network.to(dtype))
    with meta_tensors():
        return assemble(source, torch.device("meta"), dtype, transformer)


def expect(flux: Flux, mode: str, form: str | None, width: int, height: int, num_images: int = 1, steps: int = 28,
           text_tokens: int | None = None, prefetch: bool = True) -> Way:
    """What running a model without numbers in this way takes at most; with a form, quantised so."""
    flux = quantize(flux, form) if form else flux
    text_tokens = flux.config.max_text_tokens if text_tokens is None else text_tokens
    flux = flux if mode == "whole" else precompute_modulation(flux)
    apart = dict(enumerate(getattr(flux.mmdit, "precomputed", ())))
    networks = {name: network for name, network in vars(flux).items() if isinstance(network, nn.Module)} | apart
    networks |= {f"adapter {i}": adapter for i, adapter in enumerate(flux.ip_adapters)}
    size = {name: nbytes(network) for name, network in networks.items()}
    turn = {name: size[name] if mode == "whole" else at_once(network, mode, prefetch) for name, network in networks.items()}
    staying = {name: size[name] if mode == "whole" else size[name] - sum(parts(network, mode)) for name, network in networks.items()}
    working = dict.fromkeys(networks, 0) | activations(flux, width, height, num_images, text_tokens)
    ahead = min(LIMIT, steps * num_images) * sum(layer.out_features * layer_width(flux) for layers in apart.values()
                                                 for layer in layers.layers.modules() if isinstance(layer, nn.Linear))
    working["mmdit"] += ahead
    for name, network in networks.items():
        working[name] += UNPACKING * max((layer.in_features * layer.out_features for layer in network.modules()
                                          if isinstance(layer, QuantizedLinear)), default=0)
    # The modulation comes while the transformer has its turn.
    stages = {name: working[name] + (0 if mode == "whole" else turn[name]) for name in networks}
    stages |= {name: turn[name] + turn["mmdit"] + ahead for name in apart}
    device = sum(staying.values()) + max(stages.values())
    return Way(mode, form, device, {"whole": 0, "disk": max(turn.values())}.get(mode, sum(size.values())))


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for *_, tensor in offload.slots(module))


def layer_width(flux: Flux) -> int:
    """Bytes of a number that the transformer computes with."""
    return flux.mmdit.img_in.weight.element_size()


def parts(network: nn.Module, mode: str) -> list[int]:
    """The bytes that come and go with each of its parts that take turns."""
    return [sum(tensor.nbytes for *_, tensor in slots) for slots in offload.movable(network, mode)]


def at_once(network: nn.Module, mode: str, prefetch: bool) -> int:
    """The bytes that come to the device at most: of a part, and with prefetching of the next one."""
    sizes = parts(network, mode)
    return max([*sizes, *(a + b for a, b in pairwise(sizes) if prefetch and mode != "model")], default=0)


def activations(flux: Flux, width: int, height: int, num_images: int, text_tokens: int) -> dict[str, int]:
    """Network -> bytes that it holds beside its weights while it computes."""
    item, found = layer_width(flux), {}
    tokens = text_tokens + (width // 16) * (height // 16)
    found["mmdit"] = (TRANSFORMER * item + TURNING * 4) * num_images * tokens * flux.mmdit.config.hidden_size
    if flux.autoencoder:
        sizes = flux.autoencoder.config
        found["autoencoder"] = DECODER * item * num_images * width * height * sizes.ch * sizes.ch_mult[:2][-1]
    if flux.t5:
        sizes = flux.t5.config
        found["t5"] = item * text_tokens * (T5_TOKEN * sizes.d_model + T5_SCORE * sizes.num_heads * text_tokens)
    return found


# -------------------------------------------------------------------------------------------------------------- deciding


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def modes(device: torch.device) -> tuple[str, ...]:
    """On the CPU there is nowhere to come from but the disk."""
    return ("whole", "disk") if device.type == "cpu" else WAYS


def load_fitting(source: str | Path, device: torch.device, dtype: torch.dtype, transformer: str | Path | None) -> Flux:
    """`load(..., fit=True)`: the first way that fits a picture of the model's size, all of which give the same one."""
    flux, here, memory = without_numbers(source, dtype, transformer), free_memory(device), free_memory(torch.device("cpu"))
    for mode in modes(device):
        way = expect(flux, mode, None, flux.config.size, flux.config.size, prefetch=device.type == "cuda")
        if way.fits(here, memory) or mode == "disk":        # the last one is tried in any case
            break
    log.info("%s: %s, about %.1f GiB of %.1f GiB", source, mode, way.device / GIB, here / GIB)
    if mode == "whole":
        return assemble(source, device, dtype, transformer)
    # Note: in the files' own dtype, so that the weights stay mapped; each part is converted when it comes.
    with concat_on_disk() if mode == "disk" else nullcontext():
        return offload.offload(assemble(source, torch.device("cpu"), None, transformer), device, mode, dtype=dtype)


@command
def main() -> None:
    from .cli import DTYPES, Parser

    parser = Parser(prog="python -m miniflux.plan", description="Say which ways of running a model fit, without loading it.")
    parser.add_argument("--model", default="tiny", help="as for miniflux.generate (default tiny)")
    parser.add_argument("--transformer", help="a single file whose transformer replaces the model's (default: none)")
    parser.add_argument("--size", type=int, help="width and height in pixels (default: the model's)")
    parser.add_argument("--num-images", type=int, default=1, help="pictures at once (default 1)")
    parser.add_argument("--steps", type=int, default=28, help="steps a picture (default 28)")
    parser.add_argument("--vram", type=float, help="GiB on the device (default: what is free on the first of cuda, mps, cpu)")
    parser.add_argument("--ram", type=float, help="GiB of the computer's memory (default: what is free)")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default bfloat16, float32 on the CPU)")
    args = parser.parse_args()
    try:
        print("\n".join(report(args.model, args.transformer, args.size, args.num_images, args.steps, args.vram, args.ram, DTYPES.get(args.dtype))))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def report(model: str, transformer: str | None = None, size: int | None = None, num_images: int = 1, steps: int = 28,
           vram: float | None = None, ram: float | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """The lines of the command. With vram, an accelerator of so many GiB is planned for, whatever is here."""
    for name, value, least, most, whole in (("num_images", num_images, 1, 1000, True), ("steps", steps, 1, 1000, True),
                                            ("vram", vram, 0.1, 10_000, False), ("ram", ram, 0.1, 100_000, False)):
        if value is not None:
            check_number(name, value, least, most, whole=whole)
    if size is not None:
        check_side("size", size)
    device = torch.device("cuda") if vram is not None else find_device()
    dtype = dtype or default_dtype(device)
    flux = without_numbers(model, dtype, transformer)
    size = size or flux.config.size
    here = vram * GIB if vram is not None else free_memory(device)
    memory = ram * GIB if ram is not None else free_memory(torch.device("cpu"))
    lines = [f"{flux.config.name} at {size} x {size}, {num_images} at once, in {str(dtype)[6:]}; {here / GIB:.1f} GiB on "
             f"{'the device' if vram is not None else device}, {memory / GIB:.1f} GiB in the computer",
             f"{'':24} {'device':>10} {'computer':>10}   fits"]
    found = [expect(flux, mode, None, size, size, num_images, steps, prefetch=device.type == "cuda") for mode in modes(device)]
    first = next((way for way in found if way.fits(here, memory)), None)
    if first is None or first.mode != "whole":
        found += [expect(flux, mode, form, size, size, num_images, steps, prefetch=device.type == "cuda")
                  for form in FORMS for mode in modes(device)[:4]]
    for way in found:
        how = way.mode if way.mode == "whole" else f'offload "{way.mode}"'
        fits = "yes" if way.fits(here, memory) else "no"
        what = f"{fits}: load({model!r}, fit=True) does this" if way is first else fits
        lines.append(f"{', '.join(filter(None, (way.form, how))):24} {spell(way.device):>10} {spell(way.memory):>10}   {what}")
    return lines


def spell(size: int) -> str:
    return "-" if not size else f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
