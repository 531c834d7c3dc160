"""Compilation by regions: one double and one single block are compiled, and serve in the place of all.

    flux = compile(flux)                    the first step compiles, which takes a minute; further sizes at most one more

The 57 blocks of FLUX.1 are two kinds with different weights. Compiled as functions of their weights they need two graphs instead of
one 57 blocks long, and all that surrounds blocks, such as LoRAs beside their weights, residuals and caches, stays as it is. Sizes are
symbols in the graphs. Seam: model -> model. Reference: diffusers' `compile_repeated_blocks`.
"""

from dataclasses import replace
from types import MethodType

import torch
from torch import nn

from ..flux import Flux
from .around import with_parts


def compile(flux: Flux, backend: str = "inductor") -> Flux:
    """The model whose transformer's blocks are compiled when they are first needed. Its pictures are the same but for rounding.

    backend: one of torch.compile's; "inductor" needs a C++ compiler on the CPU, and Triton on CUDA. Raises ValueError for a backend
    that is not there, and for a model that has a cache or is distributed: compile it before."""
    if not callable(backend) and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f"there is no backend {backend!r} to compile with: expected one of {', '.join(torch.compiler.list_backends())}")
    for feature in ("cached", "distributed", "compiled"):
        if hasattr(flux.mmdit, feature):
            raise ValueError(f"this model is {feature} already: compile the model as it was before")
    graphs: dict = {}

    def compiled(block: nn.Module) -> nn.Module:
        forward, copied = block.forward.__func__, with_parts(block)
        # Note: the function of the class, to which the block is one more input, not the block's own method: or each block is another graph.
        graph = graphs.setdefault(forward, torch.compile(forward, backend=backend, dynamic=True))
        copied.forward = MethodType(graph, copied)
        return copied

    lists = {name: nn.ModuleList(map(compiled, getattr(flux.mmdit, name))) for name in ("double_blocks", "single_blocks")}
    mmdit = with_parts(flux.mmdit, **lists)
    mmdit.compiled = True
    return replace(flux, mmdit=mmdit)
