"""One call over several processes: its images, or the tokens of each image, are divided among them.

    torchrun --nproc-per-node 4 -m miniflux.generate "a fox" --model dev

    device = start()            the same in a script of one's own, which torchrun starts
    flux = distribute(load("dev", device=device))

Images that divide evenly among the N processes are sampled N at a time, each process its shard.
Otherwise each process has a shard of the text and image tokens (DeepSpeed-Ulysses, Jacobs et al.
2023, arXiv:2309.14509). Everything that is computed token by token needs no other process. Only
attention does, and for it tokens are exchanged for heads:

    my tokens, all heads   -- all to all -->   all tokens, my heads
                           -- attention, all to all -->   my tokens, all heads

With shard=True each process keeps 1/N of the blocks' weights, and a block is gathered when it is
needed (FSDP).

Every process gets the same result; of the commands only the first process writes and prints. The
processes meet in the order of their calls, so one thread at a time may call such a model. Seam:
model -> model.
"""

import atexit
import copy
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.quantized import QuantizedLinear
from ..devices import find_device
from ..flux import Flux
from ..networks.attention import attention_through
from ..networks.mmdit import MMDiT, MMDiTInputs
from ..networks.t5 import T5
from .features import check_order, mark
from .offload import change_networks
from .wrapping import shallow_copy, wrap_forward

# Whether this thread computes the shard of a step just now.
_in_shard: ContextVar[bool] = ContextVar("_in_shard", default=False)
_store: dist.Store | None = None  # key-value store that all processes share
_broken = False  # whether another process has ended too early


# ------------------------------------------------------------------------------------ the processes


def is_distributed() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_rank_zero() -> bool:
    """Whether this process is the one that writes and prints."""
    return not is_distributed() or os.environ.get("RANK") == "0"


def start(device: str | None = None) -> torch.device:
    """Join the processes that torchrun started, and return this one's device: its own GPU, or the
    CPU.

    device: "cuda" or "cpu" (default: CUDA where it is available)."""
    global _store
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"the device is {device!r}: with several processes, expected cuda, "
                         "of which each has its own, or cpu")
    here, backend = torch.device("cpu"), "gloo"
    if device != "cpu" and (device == "cuda" or torch.cuda.is_available()):
        here, backend = find_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}"), "nccl"
        torch.cuda.set_device(here)
    _store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    atexit.register(close)
    return here


def close() -> None:
    """At the end of this process. Note: threads that still wait for another process would abort one
    that is done."""
    if _broken:  # where a sharded network holds the group too, destroying it does not help
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1)  # torchrun should see, and report, the process that died first
        os._exit(1)
    dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other process has failed before: only the first one prints why, the others fail
    because of it."""
    try:
        return is_rank_zero() if _store is None else _store.add("failed", 1) == 1
    except RuntimeError:
        return True


@contextmanager
def lost_process_as_sentence():
    """An error that another process caused by ending becomes one sentence."""
    global _broken
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class, but name its files
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        _broken = True
        reason = " ".join(str(error).split())[:120]
        raise ConnectionError(f"another process of this run has ended ({reason}): see what it "
                              "printed, and start all of them again") from None


@contextmanager
def in_shard():
    """While this thread computes its shard of a step."""
    token = _in_shard.set(True)
    try:
        yield
    finally:
        _in_shard.reset(token)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over the shards of all processes; x itself outside of a sharded step."""
    if _in_shard.get():
        dist.all_reduce(x)
    return x


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """parts[r] goes to process r, from which a tensor of the shape shapes[r] comes back."""
    sizes = [math.prod(shape) for shape in shapes]
    sent = torch.cat([part.flatten() for part in parts])
    received = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]


def shard_sizes(n: int) -> list[int]:
    """The sizes of the processes' shards of n things: they differ by one at most."""
    size = dist.get_world_size()
    return [n // size + (rank < n % size) for rank in range(size)]


def shard(x: Tensor | None, dim: int) -> Tensor | None:
    """This process's shard of x."""
    return None if x is None else x.split(shard_sizes(x.shape[dim]), dim)[dist.get_rank()]


def all_gather(x: Tensor, n: int, dim: int) -> Tensor:
    """The whole, of size n, of which each process has a shard."""
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1:]) for size in shard_sizes(n)]
    return torch.cat(all_to_all([x] * dist.get_world_size(), shapes), dim)


# ---------------------------------------------------------------------------------------- the model


def distribute(flux: Flux, shard: bool = False) -> Flux:
    """The model whose transformer and decoder share their work with those of the other processes.

    shard: each process keeps only its shard of the weights of the transformer's and T5's blocks,
        and all else, on its own
        device; the given model may lie on the CPU.

    LoRAs and caches come before. Raises ValueError outside of several processes, for quantised
    weights with `shard`, and when sampling with more processes than the transformer has heads."""
    if not dist.is_initialized():
        raise ValueError("this process is alone: start several with `torchrun "
                         "--nproc-per-node N`, and call start() in each of them")
    check_order(flux, "distributed")
    blocks = [module for part in (flux.mmdit, flux.t5) if part for module in part.modules()]
    if shard and any(isinstance(module, QuantizedLinear) for module in blocks):
        raise ValueError("quantised weights cannot be sharded: distribute them whole, "
                         "or shard the model as it was before")
    if dist.get_world_size() == 1:
        return flux
    flux = change_networks(flux, sharded) if shard else flux
    mmdit, autoencoder = wrap_forward(flux.mmdit, SequenceParallel()), flux.autoencoder
    mark(mmdit, "distributed")
    if autoencoder is not None:
        decoder = wrap_forward(autoencoder.decoder, decode_shard)
        autoencoder = shallow_copy(autoencoder, decoder=decoder)
    return replace(flux, mmdit=mmdit, autoencoder=autoencoder)


@lost_process_as_sentence()
def decode_shard(decoder: nn.Module, call: Callable, z: Tensor) -> Tensor:
    if len(z) % dist.get_world_size():
        return call(z)
    return all_gather(call(shard(z, 0)), len(z), 0)


class SequenceParallel:
    """Wraps the transformer's `forward`: this process's shard of the images, or of the tokens; then
    the whole velocity."""

    def __init__(self):
        self.lock = threading.Lock()
        self.thread: int | None = None                      # the thread whose calls are under way
        # the memories of these calls, which end with them
        self.calls: weakref.WeakSet = weakref.WeakSet()

    def __reduce__(self):
        raise ValueError("a distributed model cannot be changed, copied or pickled any more: "
                         "do so before it is distributed")

    @lost_process_as_sentence()
    def __call__(self, mmdit: MMDiT, call: Callable, inputs: MMDiTInputs) -> Tensor:
        self.check_thread(inputs)
        B, N = inputs.img.shape[:2]
        # Note: precomputed modulation is that of all images.
        if B % dist.get_world_size() == 0 and isinstance(inputs.pooled, Tensor):
            with in_shard():
                return all_gather(call(shard_images(inputs)), B, 0)
        # Note: the positions of all tokens, since attention is over all of them.
        residuals = inputs.residuals and [shard(residual, 1) for residual in inputs.residuals]
        img, txt = shard(inputs.img, 1), shard(inputs.txt, 1)
        mine = inputs._replace(img=img, txt=txt, residuals=residuals)
        attend = partial(ulysses, shard_sizes(inputs.txt.shape[1]), shard_sizes(N))
        with in_shard(), attention_through(attend):
            v = call(mine)
        return all_gather(v, N, 1)

    def check_thread(self, inputs: MMDiTInputs) -> None:
        """Raise where another thread's call is under way: the processes would mix up what they send
        each other."""
        if inputs.memory is None:
            return
        with self.lock:
            if self.calls and self.thread != threading.get_ident():
                raise ValueError("another thread is in the middle of a call of this distributed "
                                 "model: make its calls one after the other, in the same order "
                                 "in each process")
            self.thread = threading.get_ident()
            self.calls.add(inputs.memory)


def shard_images(inputs: MMDiTInputs) -> MMDiTInputs:
    """This process's shard of the images of a batch."""
    names = ("img", "txt", "pooled", "t", "guidance")
    parts = {name: shard(getattr(inputs, name), 0) for name in names}
    residuals = inputs.residuals and [shard(residual, 0) for residual in inputs.residuals]
    image_kv = None
    if inputs.image_kv:
        # Note: keys and values of one image that all of the batch follow are not divided.
        image_kv = [[pair if len(pair[0]) == 1 else tuple(shard(x, 0) for x in pair) for pair in kv]
                    for kv in inputs.image_kv]
    return inputs._replace(**parts, residuals=residuals, image_kv=image_kv)


def ulysses(text: list[int], image: list[int], attention: Callable, qkv: Tensor, pe: Tensor,
            image_scale: Tensor, text_scale: Tensor | None, _: int) -> Tensor:
    """Attention of this process's tokens to all tokens: qkv (B, S, 3, H, D) -> (B, S, H·D).

    text, image: how many text and image tokens each process has."""
    B, S, _, H, D = qkv.shape
    if H < len(text):
        raise ValueError(f"the {H} heads of this transformer cannot be divided among {len(text)} "
                         f"processes: start at most {H}, "
                         f"or paint a multiple of {len(text)} pictures at once")
    heads, L = shard_sizes(H), sum(text)
    mine = heads[dist.get_rank()]
    shapes = [(B, L_i + N_i, 3, mine, D) for L_i, N_i in zip(text, image)]
    received = all_to_all(qkv.split(heads, 3), shapes)
    # Note: text tokens come before image tokens; each process's shard begins with its text.
    parts = zip(received, text, image)
    texts, images = zip(*(part.split([L_i, N_i], 1) for part, L_i, N_i in parts))
    scaled = 0 if text_scale is None else L
    x = attention(torch.cat([*texts, *images], dim=1), pe, image_scale, text_scale, scaled)
    shards = zip(x[:, :L].split(text, 1), x[:, L:].split(image, 1))  # x (B, L+N, mine · D)
    sent = [torch.cat(pair, dim=1) for pair in shards]
    return torch.cat(all_to_all(sent, [(B, S, h * D) for h in heads]), dim=-1)  # (B, S, H·D)


def sharded(network: nn.Module) -> nn.Module:
    """A copy of a network on this process's device, whose blocks keep only a shard of their weights
    between their calls."""
    from torch.distributed.fsdp import fully_shard

    is_cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    # Note: T5 looks up its biases in the weights of its first block before that is called, so first
    # blocks stay whole.
    names = {MMDiT: ("double_blocks", "single_blocks"), T5: ("encoder.block",)}
    lists = names.get(type(network), ())
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, memo=shared)
    blocks = [block for name in lists for block in network.get_submodule(name)[1:]]
    within = {module for block in blocks for module in block.modules()}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            # Note: FSDP takes contiguous weights only, and moves a block to the device when it
            # shards it, so that never all of them are there.
            weight = weight.data.contiguous() if module in within else weight.data.to(device)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return network
