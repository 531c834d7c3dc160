"""Offloading: a model that is larger than its device, whose parts take turns on it.

    flux = offload(load("dev", device="cpu", dtype=torch.bfloat16), "cuda", "block")

    mode        a unit is                              GiB on the device at once, of FLUX.1-dev's
                                                       weights in bfloat16
    modulation  a modulation layer; the rest stays     25.4 instead of 31.4
    model       a network: T5, CLIP, the transformer   16.2: the transformer without its modulation
    block       a block of T5 or of the transformer     1.1: a block, the next, and what is in none
    leaf        a linear layer                          0.4: likewise
    disk        a block, read from the mapped file      as block, in the computer's memory too

A unit is loaded when it is called, and stays until another one is. With CUDA the next block is
copied while the present one computes (`prefetch`). Small tensors stay on the device for good; the
modulation is precomputed (`modulation.py`), as it is not needed at every step. The results are
those of the model as it was, bit for bit where neither the device nor the dtype changes. Calls from
several threads wait for one another. Seam: model -> model.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from ..checkpoints.formats import spill
from ..checkpoints.quantized import QuantizedLinear
from ..devices import find_device
from ..flux import Flux
from ..networks.autoencoder import Autoencoder
from ..networks.mmdit import MMDiT
from ..networks.siglip import SigLIP
from ..networks.t5 import T5
from .features import check_order, mark
from .modulation import Modulations, precompute_modulation
from .pages import Pages, is_within, mapped_ranges
from .wrapping import shallow_copy, wrap_in_place

MODES = ("modulation", "model", "block", "leaf", "disk")
# Layers that always stay on the device: from them others read where a network runs, and in which
# dtype.
ANCHORS = {MMDiT: "img_in", SigLIP: "vision_model.embeddings.patch_embedding"}
# Elements of a tensor that always stays: norms, and T5's table of distances, which is read before
# its block runs.
SMALL = 4096


def offload(flux: Flux, device: torch.device | str, mode: str = "model", *, prefetch: bool = True,
            dtype: torch.dtype | None = None) -> Flux:
    """The model whose units lie where they are now, and are loaded to a device in turn.

    device: where to compute.
    mode: "modulation", "model", "block", "leaf" or "disk"; see the table above.
    prefetch: whether the next unit is copied while one computes. In the modes block and leaf with
        CUDA this keeps the
        weights in page-locked memory.
    dtype: what to compute in (default: as the weights are); each unit is converted when it is
        loaded.

    In the mode disk (and modulation on the CPU), weights that are not mapped from a file (joined,
    merged or converted ones) are written to one in the folder for temporary files, which the
    variable TMPDIR sets; `load(..., fit=True)` does so with what it joins, piece by piece.

    Add LoRAs, and quantise, before: an offloaded model cannot be changed. The given model stays as
        it is; drop it to free its memory. Raises ValueError for another mode or device, and for a
        model that is offloaded already or lies on the device."""
    device = find_device(device)
    if mode not in MODES:
        raise ValueError(f"the mode is {mode!r}: expected one of {', '.join(MODES)}")
    check_order(flux, "offloaded")
    at = flux.mmdit.img_in.weight.device
    if at.type != "cpu":
        raise ValueError(f'this model lies on {at}: load it with device="cpu", '
                         "from where its parts can come")
    offloader = Offloader(device, dtype, prefetch, mode)
    return change_networks(replace(precompute_modulation(flux), loras=None), offloader.changed)


def change_networks(flux: Flux, change: Callable[[nn.Module], nn.Module]) -> Flux:
    """The model with each of its networks changed."""
    parts = {field.name: getattr(flux, field.name) for field in fields(flux)}
    changed = {name: change(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    adapters = tuple(change(adapter) for adapter in flux.ip_adapters)
    return replace(flux, **changed, ip_adapters=adapters)


def own(module: nn.Module) -> nn.Module:
    """A copy of a network that shares every weight, but has a module of its own for each part."""
    return shallow_copy(module, **{name: own(child) for name, child in module.named_children()})


def offload_units(network: nn.Module, mode: str) -> list[nn.Module]:
    """The parts of a network that are loaded and evicted; what is in none of them stays on the
    device."""
    if isinstance(network, Modulations):
        return [network.embedders, *network.layers]
    if mode == "modulation":
        return []
    if isinstance(network, Autoencoder):
        # Note: these are called, the network itself is not
        return [network.encoder, network.decoder]
    if mode == "model" or not isinstance(network, MMDiT | T5):
        return [network]
    if mode == "leaf":
        return [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Embedding)]
    if isinstance(network, T5):
        return [network.shared, *network.encoder.block]
    return [*network.double_blocks, *network.single_blocks]


Slot = tuple[dict, str, Tensor]  # where a module keeps a tensor, under which name, and the tensor


def slots(module: nn.Module) -> Iterator[Slot]:
    """The places of all tensors of a module. Quantised layers keep theirs as buffers."""
    for owner in module.modules():
        for holder in (owner._parameters, owner._buffers):
            for name, tensor in list(holder.items()):
                if tensor is not None:
                    yield holder, name, tensor


def movable(network: nn.Module, mode: str) -> list[list[Slot]]:
    """For each unit of a network, the tensors that are loaded and evicted with it."""
    anchor = ANCHORS.get(type(network))
    staying = set()
    if anchor is not None:
        staying = {id(tensor) for *_, tensor in slots(network.get_submodule(anchor))}
    return [[slot for slot in slots(unit) if slot[2].numel() > SMALL and id(slot[2]) not in staying]
            for unit in offload_units(network, mode)]


class Offloader:
    """Tracks which units are on the device, and moves them. One thread's call at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None, prefetch: bool, mode: str,
                 evict_after_call: bool = False):
        self.device = device
        self.dtype = dtype
        self.prefetch = prefetch
        self.mode = mode
        self.evict_after_call = evict_after_call
        self.loaded: list[nn.Module] = []
        # which unit is called after which, as far as that is known
        self.following: dict[nn.Module, nn.Module] = {}
        self.last: nn.Module | None = None                  # the unit that was called last
        self.done: torch.cuda.Event | None = None           # when that unit has computed
        self.pages = Pages()
        overlap = device.type == "cuda" and prefetch and mode != "model"
        self.stream = torch.cuda.Stream(device) if overlap else None
        # Note: a unit that computes for one thread must not be evicted by another one.
        self.lock = threading.RLock()

    def __deepcopy__(self, _):
        raise ValueError("an offloaded model cannot be changed any more: "
                         "add LoRAs, quantise and copy it before it is offloaded")

    def __reduce__(self):
        raise ValueError("an offloaded model cannot be pickled: "
                         "pickle the model as it was, and offload it again")

    # ------------------------------------------------------------------------------------ beginning

    def changed(self, network: nn.Module) -> nn.Module:
        """A copy of the network whose units are loaded and evicted."""
        network = own(network)
        movables = movable(network, self.mode)
        units = [unit for unit, going in zip(offload_units(network, self.mode), movables) if going]
        going = sum(movables, [])
        if self.mode == "disk":
            self.map(going)
        elif self.stream:
            for holder, name, tensor in going:
                self.put(holder, name, tensor.pin_memory())
        self.place_the_rest(network, going)
        self.following |= zip(units, units[1:] + units[:1])
        for unit in units:
            wrap_in_place(unit, "forward", self.run_unit)
        for root in units if isinstance(network, Autoencoder) else [network]:
            wrap_in_place(root, "forward", self.run_network)
        network.offloader = self
        if isinstance(network, MMDiT):
            mark(network, "offloaded")
        if hasattr(network, "precomputed"):
            # Note: with an offloader of its own, as the transformer calls it while it is loaded
            # itself. On the CPU, whose memory is the device's, what is to leave it goes to the
            # disk.
            mode = "disk" if self.mode == "modulation" and self.device.type == "cpu" else self.mode
            inner = Offloader(self.device, self.dtype, self.prefetch, mode, evict_after_call=True)
            network.precomputed = tuple(inner.changed(layers) for layers in network.precomputed)
        return network

    def place_the_rest(self, network: nn.Module, going: list[Slot]) -> None:
        """Everything else goes to the device, and stays there."""
        leaving = {id(holder[name]) for holder, name, _ in going}
        for holder, name, tensor in slots(network):
            if id(tensor) not in leaving:
                self.put(holder, name, self.copy(tensor))
        for module in network.modules():
            if self.dtype and isinstance(module, QuantizedLinear):
                module.dtype = self.dtype

    def map(self, going: list[Slot]) -> None:
        """Make sure that all of these can be read from a file again whenever they are needed."""
        ranges = mapped_ranges()
        if ranges is None:  # Note: elsewhere the system drops by itself what it can read again
            return
        loose = [slot for slot in going if not is_within(slot[2], ranges)]
        for (holder, name, _), mapped in zip(loose, spill([[tensor] for *_, tensor in loose])):
            self.put(holder, name, mapped)
        for holder, name, _ in going:
            self.pages.add(holder[name])
            self.pages.drop(holder[name])

    # -------------------------------------------------------------------------------------- running

    def run_network(self, network: nn.Module, call: Callable, *inputs, **named):
        """Wraps a network's `forward`."""
        with self.lock:
            try:
                named = {name: self.to_device(value) for name, value in named.items()}
                return call(*self.to_device(inputs), **named)
            finally:
                if self.evict_after_call:
                    self.evict_all()

    def run_unit(self, unit: nn.Module, call: Callable, *inputs, **named):
        """Wraps a unit's `forward`: if it is not on the device yet, the others are evicted, and it
        is loaded."""
        if self.last not in (None, unit):
            self.following[self.last] = unit                # next time, it will be on its way
        self.last = unit
        if unit not in self.loaded:
            self.evict_all()
            self.load(unit)
            if self.mode == "disk" and self.prefetch:
                for *_, tensor in slots(self.following.get(unit, unit)):
                    self.pages.announce(tensor)
        if self.stream is None:
            return call(*inputs, **named)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        result = call(*inputs, **named)
        self.prefetch_next(unit)
        return result

    def prefetch_next(self, unit: nn.Module) -> None:
        """While a unit computes, the next one is copied into the place of the one before."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        if self.done is not None:
            # Note: waited for on the host, too: memory that is freed earlier would not be free yet,
            # and ever more would be taken.
            self.done.synchronize()
        self.done = done
        following = self.following.get(unit, unit)
        for other in list(self.loaded):
            if other not in (unit, following):
                self.evict(other)
        if following not in self.loaded:
            self.load(following)

    def to_device(self, value):
        """Inputs on the device, in the dtype that is computed in."""
        if isinstance(value, list | tuple):
            moved = map(self.to_device, value)
            return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        return value

    # --------------------------------------------------------------------------------------- moving

    def load(self, unit: nn.Module) -> None:
        with torch.cuda.stream(self.stream):                # None is the present one
            for holder, name, tensor in slots(unit):
                copy = self.copy(tensor)
                if copy is not tensor:
                    self.put(holder, name, copy)
                    holder[name].resting = tensor
                    self.pages.drop(tensor)
        self.loaded.append(unit)

    def evict(self, unit: nn.Module) -> None:
        for holder, name, tensor in slots(unit):
            holder[name] = getattr(tensor, "resting", tensor)
            self.pages.drop(holder[name])
        self.loaded.remove(unit)

    def evict_all(self) -> None:
        if self.stream:
            torch.cuda.synchronize(self.device)             # what they compute must be finished
        for unit in list(self.loaded):
            self.evict(unit)

    def copy(self, tensor: Tensor) -> Tensor:
        # Note: quantised weights, which are buffers, are bytes and their scales: they are moved,
        # not converted.
        dtype = self.dtype if isinstance(tensor, nn.Parameter) else None
        moved = tensor.to(self.device, non_blocking=self.stream is not None)
        return moved.to(dtype or tensor.dtype)

    def put(self, holder: dict, name: str, tensor: Tensor) -> None:
        is_parameter = isinstance(holder[name], nn.Parameter)
        holder[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
