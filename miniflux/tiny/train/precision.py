"""How the networks are run while they learn: in which precision, with which attention."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ...networks.attention import attention_backend


@contextmanager
def training_mode(device: torch.device) -> Iterator[None]:
    """Mixed precision where that is faster, and attention by its formula: for a hundred tokens its
    backward pass is faster than that of the fused kernels, which compute their scores twice."""
    half = fastest_dtype(device.type) == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=half), attention_backend("formula"):
        yield


@cache
def fastest_dtype(device: str, size: int = 512) -> torch.dtype:
    """The dtype in which this device multiplies matrices faster: bfloat16 or float32.

    Note: that depends on the processor. A Zen 3 emulates bfloat16 a hundred times slower; an Intel
    with AMX is several times faster with it. So one product of each is timed."""
    if device != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        a @ a
        began = time.perf_counter()
        a @ a
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=seconds.get)
