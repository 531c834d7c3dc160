"""Offloading: a model that is larger than its device, whose parts take turns on it.

    flux = offload(load("dev", device="cpu", dtype=torch.bfloat16), "cuda", "block")

    mode        a part is                               on the device at once, of FLUX.1-dev's weights in bfloat16
    modulation  a modulation layer; all else stays      25.4 GiB instead of 31.4: of the transformer, 16.1 instead of 22.2
    model       a network: T5, CLIP, the transformer    16.2 GiB: the transformer without its modulation
    block       a block of T5 or of the transformer      1.1 GiB: one, the one that comes after it, and what is in no block
    leaf        a linear layer                           0.4 GiB: likewise
    disk        a block, read from the mapped file       as block; in the computer's memory, too, there is no more than that

A part comes when it is called, and stays until another one is: text encoders are gone once they have encoded. With CUDA the coming
block is copied while the present one computes (`prefetch`). What is small stays on the device for good, and tells the others where
the model is; the modulation is precomputed (`modulation.py`), as it need not come at every step. The numbers are those of the model
as it was, bit for bit where neither the device nor the dtype changes. Seam: model -> model.
"""

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.formats import spill
from ..checkpoints.packed import PackedLinear
from ..devices import find_device
from ..flux import Flux
from ..networks.autoencoder import Autoencoder
from ..networks.mmdit import MMDiT
from ..networks.siglip import SigLIP
from ..networks.t5 import T5
from .modulation import Modulations, precompute_modulation
from .wrapping import shallow_copy

MODES = ("modulation", "model", "block", "leaf", "disk")
# Note: these stay even when all else goes: they tell the others where the network is, and in which dtype it wants its input.
TELLING = {MMDiT: "img_in", SigLIP: "vision_model.embeddings.patch_embedding"}
SMALL = 4096               # numbers of a tensor that stays: norms, and T5's table of distances, which is read before its block runs


def offload(flux: Flux, device: torch.device | str, mode: str = "model", *, prefetch: bool = True,
            dtype: torch.dtype | None = None) -> Flux:
    """The model whose parts lie where they are now, and come to `device` in turn.

    mode: see above. prefetch: whether the next part is on its way meanwhile; in the modes block and leaf with CUDA, this keeps the
    weights in page-locked memory. dtype: what to compute in (default: as the weights are); each part is converted when it comes. In
    the mode disk (and modulation on the CPU), what is not mapped from a file (joined, merged or converted weights) is written to one
    in the folder for temporary files, which the variable TMPDIR sets; `load(..., fit=True)` does so with what it joins, piece by piece.

    It comes last: an offloaded model takes no more LoRAs, and those that it has become part of it. Raises ValueError for another mode
    or device, and for a model that is offloaded already or lies on the device. The given model stays as it is; drop it to free its
    memory."""
    device = find_device(device)
    if mode not in MODES:
        raise ValueError(f"the mode is {mode!r}: expected one of {', '.join(MODES)}")
    if hasattr(flux.mmdit, "turns"):
        raise ValueError("this model is offloaded already: offload the model as it was before")
    if (at := flux.mmdit.img_in.weight.device).type != "cpu":
        raise ValueError(f'this model lies on {at}: load it with device="cpu", from where its parts can come')
    flux, turns = precompute_modulation(flux), Turns(device, dtype, prefetch, mode)
    return change_networks(replace(flux, loras=None), turns.rule)


def change_networks(flux: Flux, change: Callable[[nn.Module], nn.Module]) -> Flux:
    """The model with each of its networks changed."""
    parts = {field.name: getattr(flux, field.name) for field in fields(flux)}
    changed = {name: change(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    return replace(flux, **changed, ip_adapters=tuple(change(adapter) for adapter in flux.ip_adapters))


def own(module: nn.Module) -> nn.Module:
    """A copy of a network that shares every weight, but holds each of them itself."""
    return shallow_copy(module, **{name: own(child) for name, child in module.named_children()})


def takers(network: nn.Module, mode: str) -> list[nn.Module]:
    """The parts of a network that take turns; what is in none of them stays on the device."""
    if isinstance(network, Modulations):
        return [network.embedders, *network.layers]
    if mode == "modulation":
        return []
    if isinstance(network, Autoencoder):
        return [network.encoder, network.decoder]           # Note: they are what is called, not the network
    if mode == "model" or not isinstance(network, (MMDiT, T5)):
        return [network]
    if mode == "leaf":
        return [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    if isinstance(network, T5):
        return [network.shared, *network.encoder.block]
    return [*network.double_blocks, *network.single_blocks]


Slot = tuple[dict, str, Tensor]                             # where a module keeps a tensor, under which name, and the tensor


def slots(module: nn.Module) -> Iterator[Slot]:
    """The places of all tensors of a module. Packed layers keep theirs as buffers."""
    for owner in module.modules():
        for holder in (owner._parameters, owner._buffers):
            yield from [(holder, name, tensor) for name, tensor in holder.items() if tensor is not None]


def movable(network: nn.Module, mode: str) -> list[list[Slot]]:
    """For each part that takes turns, what comes and goes with it."""
    telling = network.get_submodule(TELLING[type(network)]) if type(network) in TELLING else nn.Identity()
    staying = [id(tensor) for *_, tensor in slots(telling)]
    return [[slot for slot in slots(part) if slot[2].numel() > SMALL and id(slot[2]) not in staying] for part in takers(network, mode)]


class Turns:
    """Who is on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None, prefetch: bool, mode: str):
        self.device, self.dtype, self.prefetch, self.mode = device, dtype, prefetch, mode
        self.here: list[nn.Module] = []
        self.following: dict[nn.Module, nn.Module] = {}     # who is called after whom, as far as that is known
        self.last: nn.Module | None = None                  # who was called last
        self.mapped: dict[int, Tensor] = {}                 # address -> tensor whose pages can be read from a file again
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and prefetch and mode != "model" else None
        self.done = None                                    # when the part that was called last has computed

    def __deepcopy__(self, _):
        raise ValueError("an offloaded model cannot be changed any more: add LoRAs, and quantise, before it is offloaded")

    # --------------------------------------------------------------------------------------------------------- beginning

    def rule(self, network: nn.Module) -> nn.Module:
        """A copy of the network whose parts take turns."""
        network = own(network)
        movables = movable(network, self.mode)
        parts, going = [part for part, slots in zip(takers(network, self.mode), movables) if slots], sum(movables, [])
        if self.mode == "disk":
            self.map(going)
        elif self.stream:
            for holder, name, tensor in going:
                self.put(holder, name, tensor.pin_memory())
        going = {id(holder[name]) for holder, name, _ in going}
        for holder, name, tensor in slots(network):
            if id(tensor) not in going:
                self.put(holder, name, self.copy(tensor))
        for module in network.modules():
            if self.dtype and isinstance(module, PackedLinear):
                module.dtype = self.dtype
        self.following |= zip(parts, parts[1:] + parts[:1])
        for root in parts if isinstance(network, Autoencoder) else [network]:
            root.register_forward_pre_hook(self.fetch_inputs)
        for part in parts:
            part.register_forward_pre_hook(self.take)
            if self.stream:
                part.register_forward_hook(self.pass_on)
        network.turns = self
        if hasattr(network, "precomputed"):
            # Note: with turns of its own, as the transformer calls it while it has its own turn.
            # On the CPU, whose memory is the device's, what is to leave it goes to the disk.
            mode = "disk" if self.mode == "modulation" and self.device.type == "cpu" else self.mode
            apart = Turns(self.device, self.dtype, self.prefetch, mode)
            network.precomputed = tuple(apart.rule(layers) for layers in network.precomputed)
            network.precomputed[0].register_forward_hook(apart.clear)
        return network

    def map(self, going: list[Slot]) -> None:
        """Sees to it that all of these can be read from a file again whenever they are needed."""
        ranges = mapped_ranges()
        if ranges is None:                                  # Note: elsewhere the system itself takes back what it can read again
            return
        loose = [slot for slot in going if not is_within(slot[2], ranges)]
        for (holder, name, tensor), mapped in zip(loose, spill([[tensor] for *_, tensor in loose])):
            self.put(holder, name, mapped)
        self.mapped |= {holder[name].data_ptr(): holder[name] for holder, name, _ in going}
        for holder, name, _ in going:
            self.give_back(holder[name])

    # ------------------------------------------------------------------------------------------------------------ turning

    def fetch_inputs(self, _: nn.Module, inputs: tuple) -> tuple:
        return self.to_device(inputs)

    def to_device(self, value):
        if isinstance(value, (list, tuple)):
            moved = map(self.to_device, value)
            return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        return value

    def take(self, part: nn.Module, _: tuple) -> None:
        """Before a part runs: if it is not here yet the others leave, and it comes."""
        if self.last not in (None, part):
            self.following[self.last] = part                # next time, it will be on its way
        self.last = part
        if part not in self.here:
            self.clear()
            self.come(part)
            if self.mode == "disk" and self.prefetch:
                for *_, tensor in slots(self.following.get(part, part)):
                    self.advise(tensor, "WILLNEED")
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def pass_on(self, part: nn.Module, *_) -> None:
        """After a part has been called: while it computes, the next one is copied into the place of the one before."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        if self.done is not None:
            # Note: on this side, too: memory that is freed earlier would not be free yet, and ever more would be taken.
            self.done.synchronize()
        self.done, following = done, self.following.get(part, part)
        for other in list(self.here):
            if other not in (part, following):
                self.leave(other)
        if following not in self.here:
            self.come(following)

    def clear(self, *_) -> None:
        """All leave."""
        if self.stream:
            torch.cuda.synchronize(self.device)             # what they compute must be finished
        for part in list(self.here):
            self.leave(part)

    def come(self, part: nn.Module) -> None:
        with torch.cuda.stream(self.stream):                # None is the present one
            for holder, name, tensor in slots(part):
                if (copy := self.copy(tensor)) is not tensor:
                    self.put(holder, name, copy)
                    holder[name].resting = tensor
                    self.give_back(tensor)
        self.here.append(part)

    def leave(self, part: nn.Module) -> None:
        for holder, name, tensor in slots(part):
            holder[name] = getattr(tensor, "resting", tensor)
            self.give_back(holder[name])
        self.here.remove(part)

    def copy(self, tensor: Tensor) -> Tensor:
        # Note: packed weights, which are buffers, are bytes and their scales: they are moved, not converted.
        dtype = self.dtype if isinstance(tensor, nn.Parameter) else None
        return tensor.to(self.device, non_blocking=self.stream is not None).to(dtype or tensor.dtype)

    def put(self, holder: dict, name: str, tensor: Tensor) -> None:
        holder[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(holder[name], nn.Parameter) else tensor

    # -------------------------------------------------------------------------------------------------------------- pages

    def give_back(self, tensor: Tensor) -> None:
        self.advise(tensor, "DONTNEED")

    def advise(self, tensor: Tensor, advice: str) -> None:
        """Tells the system that the pages of a mapped tensor are not needed now, or will be soon."""
        # Note: of other memory, "not needed" would make zeros. An address in `mapped` belongs to the tensor that is kept there.
        if (address := tensor.data_ptr()) in self.mapped:
            begin = address // mmap.PAGESIZE * mmap.PAGESIZE
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + tensor.nbytes - begin),
                                      getattr(mmap, f"MADV_{advice}"))


def mapped_ranges() -> list[tuple[int, int]] | None:
    """The addresses at which files are mapped and nothing has been changed since; None where they cannot be known."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return None
    # A mapping: "begin-end rights offset device inode path", then its properties, a line each.
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) .*\n(?:[A-Z]\w+: .*\n)*?Anonymous: +(\d+)", text, re.M)
    return [(int(begin, 16), int(end, 16)) for begin, end, inode, changed in found if inode != "0" and changed == "0"]


def is_within(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return tensor.device.type == "cpu" and any(low <= begin and end <= high for low, high in ranges)
