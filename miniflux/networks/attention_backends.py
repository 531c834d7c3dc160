"""Which implementation computes attention, and what it is wrapped in.

    with attention_backend("formula"):            every attention in the block is computed that way
    with attention_through(function):             every attention in the block is passed through it

Both hold for the thread that entered the block, and can be nested."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

BACKENDS = {
    "auto": "the fastest that was measured, of those that are available",
    "formula": "written out",
    "sdpa": "PyTorch's scaled_dot_product_attention",
    "chunked": "sdpa, some queries at a time where the score matrix is large",
    "native": "norm, rotation and attention in one compiled kernel",
    "norm_rope": "norm and rotation in a compiled kernel, then sdpa",
}


# -------------------------------------------------------------------------- what is in force


class Settings(threading.local):
    """Each thread has its own."""

    backend = "auto"
    wrappers: tuple[Callable[..., Tensor], ...] = ()        # the outermost first


_settings = Settings()

# Note: a compiled graph cannot depend on thread-locals. It depends on this copy, and is compiled
# anew when it changes: the block that was entered last, in whichever thread.
_blocks: list[tuple[str, tuple[Callable[..., Tensor], ...]]] = [("auto", ())]
_for_graphs = _blocks[0]
_lock = threading.Lock()


def current_settings() -> tuple[str, tuple[Callable[..., Tensor], ...]]:
    """The backend and the wrappers in force."""
    if torch.compiler.is_compiling():
        return _for_graphs
    return _settings.backend, _settings.wrappers


@contextmanager
def _in_force(backend: str, wrappers: tuple[Callable[..., Tensor], ...]) -> Iterator[None]:
    global _for_graphs
    before = _settings.backend, _settings.wrappers
    block = (backend, wrappers)
    with _lock:
        _blocks.append(block)
        _for_graphs = block
    _settings.backend, _settings.wrappers = block
    try:
        yield
    finally:
        _settings.backend, _settings.wrappers = before
        with _lock:
            _blocks.remove(block)
            _for_graphs = _blocks[-1]


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        expected = ", ".join(BACKENDS)
        raise ValueError(f"there is no attention backend {name!r}: expected one of {expected}")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Within it, attention is computed by one of BACKENDS."""
    check_backend(name)
    with _in_force(name, _settings.wrappers):
        yield


@contextmanager
def attention_through(function: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, each attention(qkv, pe, img_scale, txt_scale, L) is replaced by
    function(attention, qkv, pe, img_scale, txt_scale, L).

    txt_scale is None where all tokens share img_scale. In nested blocks the inner function is
    called first, and its `attention` is the outer function."""
    with _in_force(_settings.backend, (*_settings.wrappers, function)):
        yield


# ------------------------------------------------------------------------------- the choice


def select_backend(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor) -> str:
    """The fastest backend for these tensors."""
    if qkv.is_mps:
        return "chunked"
    # With CUDA nothing was measured yet: its kernels run only where they are asked for by name.
    # Modes and transforms cannot see a kernel; a compiled graph holds it as one operation.
    eager = native.is_eager()
    if (
        not qkv.is_cpu
        or not (eager or torch.compiler.is_compiling())
        or native.needs_gradients(qkv, pe, img_scale, txt_scale)
        or native.refusal(qkv, pe, img_scale, txt_scale, eager=eager)
    ):
        return "sdpa"
    # Measured on two cores: the kernel takes 0.55 to 0.9 of the time of norm_rope from 96 tokens to
    # 4608, and as long from 8704 on, where its packed keys and values only take memory.
    if qkv.shape[1] <= 4608:
        return "native"
    return "sdpa" if native.elements_overlap(qkv) else "norm_rope"


# Elements of one score matrix: 4 GiB of float32, and fewer than the 2^31 that MPS can count.
MPS_SCORES = 2**30


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, some queries at a time where MPS cannot hold the score matrix."""
    rows = max(1, MPS_SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
    parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)]
    return torch.cat(parts, dim=2)                                          # (B, H, S, D)
