"""One call over several processes: its pictures, or the tokens of each picture, are divided among them.

    torchrun --nproc-per-node 4 -m miniflux.generate "a fox" --model dev

    device = start()                                        the same in one's own script, which torchrun starts
    flux = distribute(load("dev", device=device))

Pictures that divide evenly among the N processes are painted N at a time, each process its share. Otherwise each process has a
share of the text and image tokens (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509). All that is done token by token needs no
other process; only attention does, and for it tokens are exchanged for heads:

    my tokens, all heads   -- all to all -->   all tokens, my heads   -- attention -- all to all -->   my tokens, all heads

With shard=True each process keeps 1/N of the blocks' weights, and a block is put together when it is needed (FSDP).

Every process gets the same result; the commands let only the first one write and speak. Seam: model -> model.
"""

import atexit
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.packed import PackedLinear
from ..devices import find_device
from ..flux import Flux
from ..networks.attention import attention_through
from ..networks.mmdit import MMDiT, MMDiTInputs
from ..networks.t5 import T5
from .offload import change_networks
from .wrapping import shallow_copy, wrap_forward

_shared = False                                             # whether this process computes a share of a step just now
_store = None                                               # where the processes leave notes for each other
_broken = False                                             # whether another process has ended too early


# ---------------------------------------------------------------------------------------------------------- the processes


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not several() or os.environ.get("RANK") == "0"


def start(device: str | None = None) -> torch.device:
    """Joins the processes that torchrun started; returns this one's device: its own GPU, or the CPU. device: "cuda" or "cpu"."""
    global _store
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"the device is {device!r}: with several processes, expected cuda, of which each has its own, or cpu")
    here, backend = torch.device("cpu"), "gloo"
    if device != "cpu" and (device == "cuda" or torch.cuda.is_available()):
        here, backend = find_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}"), "nccl"
        torch.cuda.set_device(here)
    _store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    atexit.register(leave)
    return here


def leave() -> None:
    """At the end of this process. Note: threads that still wait for another process would abort one that is done."""
    if _broken:                                             # destroying the group does not help where a sharded network holds it too
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1)                                       # torchrun is to see, and to report, the process that died first
        os._exit(1)
    dist.destroy_process_group()


def fails_first() -> bool:
    """Whether no other process has failed before: the first one says why, the others fail because of it."""
    try:
        return leads() if _store is None else _store.add("failed", 1) == 1
    except RuntimeError:
        return True


@contextmanager
def together():
    """What fails within because another process is gone becomes one sentence."""
    global _broken
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's errors have no class, but name its files
            raise
        _broken = True
        raise ConnectionError(f"another process of this run has ended ({' '.join(str(error).split())[:120]}): see what it said, "
                              "and start all of them again") from None


@contextmanager
def shared():
    """While this process computes its share of a step."""
    global _shared
    _shared = True
    try:
        yield
    finally:
        _shared = False


def add_up(x: Tensor) -> Tensor:
    """The sum over the shares of all processes; x itself outside of a shared step."""
    if _shared:
        dist.all_reduce(x)
    return x


def exchange(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """parts[r] goes to process r, from which a tensor of the shape shapes[r] comes back."""
    sizes = [math.prod(shape) for shape in shapes]
    sent, received = torch.cat([part.flatten() for part in parts]), parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]


# ------------------------------------------------------------------------------------------------------------- the model


def distribute(flux: Flux, shard: bool = False) -> Flux:
    """The model whose transformer and decoder share their work with those of the other processes.

    shard: each process keeps only its share of the weights of the transformer's and T5's blocks, and all else, on its own device; the
    given model may lie on the CPU. Raises ValueError outside of several processes, for quantised weights with `shard`, and when
    painting with more processes than the transformer has heads. LoRAs and caches come before."""
    if not dist.is_initialized():
        raise ValueError("this process is alone: start several with `torchrun --nproc-per-node N`, and call start() in each of them")
    if hasattr(flux.mmdit, "distributed"):
        raise ValueError("this model is distributed already")
    if shard and any(isinstance(module, PackedLinear) for part in (flux.mmdit, flux.t5) if part for module in part.modules()):
        raise ValueError("quantised weights cannot be sharded: distribute them whole, or shard the model as it was before")
    if dist.get_world_size() == 1:
        return flux
    flux = change_networks(flux, sharded) if shard else flux
    mmdit, autoencoder = wrap_forward(flux.mmdit, Shares()), flux.autoencoder
    mmdit.distributed = True
    if autoencoder is not None:
        autoencoder = shallow_copy(autoencoder, decoder=wrap_forward(autoencoder.decoder, decode_share))
    return replace(flux, mmdit=mmdit, autoencoder=autoencoder)


def even(n: int) -> list[int]:
    """The sizes of the processes' shares of n things: they differ by one at most."""
    size = dist.get_world_size()
    return [n // size + (rank < n % size) for rank in range(size)]


def share(x: Tensor | None, dim: int) -> Tensor | None:
    """This process's share of x."""
    return None if x is None else x.split(even(x.shape[dim]), dim)[dist.get_rank()]


def gather(x: Tensor, n: int, dim: int) -> Tensor:
    """The whole whose shares the processes have; n: its size."""
    return torch.cat(exchange([x] * dist.get_world_size(), [(*x.shape[:dim], size, *x.shape[dim + 1:]) for size in even(n)]), dim)


@together()
def decode_share(decoder: nn.Module, call: Callable, z: Tensor) -> Tensor:
    if len(z) % dist.get_world_size():
        return call(z)
    return gather(call(share(z, 0)), len(z), 0)


class Shares:
    """Wraps the transformer's `forward`: this process's share of the pictures, or of the tokens; then the whole velocity."""

    @together()
    def __call__(self, mmdit: MMDiT, call: Callable, inputs: MMDiTInputs) -> Tensor:
        B, N = inputs.img.shape[:2]
        # Note: modulation that is precomputed is that of all pictures.
        if B % dist.get_world_size() == 0 and isinstance(inputs.pooled, Tensor):
            with shared():
                return gather(call(share_images(inputs)), B, 0)
        # Note: the positions of all tokens, since attention sees all of them.
        mine = inputs._replace(img=share(inputs.img, 1), txt=share(inputs.txt, 1),
                               residuals=inputs.residuals and [share(residual, 1) for residual in inputs.residuals])
        with shared(), attention_through(partial(ulysses, even(inputs.txt.shape[1]), even(N))):
            v = call(mine)
        return gather(v, N, 1)


def share_images(inputs: MMDiTInputs) -> MMDiTInputs:
    """This process's share of the images of a batch."""
    parts = {name: share(getattr(inputs, name), 0) for name in ("img", "txt", "pooled", "t", "guidance")}
    residuals = inputs.residuals and [share(residual, 0) for residual in inputs.residuals]
    image_kv = inputs.image_kv and [
        [(k, v) if len(k) == 1 else (share(k, 0), share(v, 0)) for k, v in kv] for kv in inputs.image_kv]
    return inputs._replace(**parts, residuals=residuals, image_kv=image_kv)


def ulysses(text: list[int], image: list[int], attention: Callable, qkv: Tensor, pe: Tensor, image_scale: Tensor,
            text_scale: Tensor | None, _: int) -> Tensor:
    """The attention of all tokens for those of this process: qkv (B, S, 3, H, D) -> (B, S, H·D); text, image: how many of them each
    process has."""
    B, S, _, H, D = qkv.shape
    if H < len(text):
        raise ValueError(f"the {H} heads of this transformer cannot be divided among {len(text)} processes: start at most {H}, "
                         f"or paint a multiple of {len(text)} pictures at once")
    heads, L = even(H), sum(text)
    mine = heads[dist.get_rank()]
    received = exchange(qkv.split(heads, 3), [(B, l + n, 3, mine, D) for l, n in zip(text, image)])
    # Note: text tokens come before image tokens; each process's share begins with its text.
    texts, images = zip(*(part.split([l, n], 1) for part, l, n in zip(received, text, image)))
    x = attention(torch.cat([*texts, *images], dim=1), pe, image_scale, text_scale, 0 if text_scale is None else L)
    shares = zip(x[:, :L].split(text, 1), x[:, L:].split(image, 1))             # x (B, L+N, mine · D)
    return torch.cat(exchange([torch.cat(pair, dim=1) for pair in shares], [(B, S, h * D) for h in heads]), dim=-1)


def sharded(network: nn.Module) -> nn.Module:
    """A copy of a network on this process's device, whose blocks keep only a share of their weights between their calls."""
    from torch.distributed.fsdp import fully_shard

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    # Note: T5 looks up its biases in the weights of its first block before that is called, so first blocks stay whole.
    lists = ("double_blocks", "single_blocks") if isinstance(network, MMDiT) else ("encoder.block",) if isinstance(network, T5) else ()
    network = copy.deepcopy(network, memo={id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    blocks = [block for name in lists for block in network.get_submodule(name)[1:]]
    within = {module for block in blocks for module in block.modules()}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            # Note: FSDP takes contiguous weights only, and moves a block to the device when it shards it: never all of them are there.
            weight = weight.data.contiguous() if module in within else weight.data.to(device)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return network
