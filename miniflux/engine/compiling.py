"""Compilation by regions: one double and one single block are compiled, and serve in the place of
all.

    flux = compile(flux)        the first step compiles, which takes a minute; other sizes at most
                                one more

The 57 blocks of FLUX.1 are two kinds with different weights. Compiled as functions of their weights
they need two graphs instead of one 57 blocks long, and all that surrounds blocks, such as LoRAs
beside their weights, residuals and caches, stays as it is. Sizes are symbols in the graphs. Seam:
model -> model. Reference: diffusers' `compile_repeated_blocks`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..flux import Flux
from .features import check_order, mark
from .wrapping import shallow_copy, wrap_in_place


def compile(flux: Flux, backend: str = "inductor") -> Flux:
    """The model whose transformer's blocks are compiled when they are first needed. Its pictures
    are the same but for rounding.

    backend: one of torch.compile's; "inductor" needs a C++ compiler on the CPU, and Triton on CUDA.
        Raises ValueError for a backend that is not there, and for a model that has a cache or is
        distributed: compile it before."""
    if not callable(backend) and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f"there is no backend {backend!r} to compile with: "
                         f"expected one of {', '.join(torch.compiler.list_backends())}")
    check_order(flux, "compiled")

    def compiled(block: nn.Module) -> nn.Module:
        copied = shallow_copy(block)
        # Note: innermost, as the graph computes all that the block itself does; what else surrounds
        # it stays around.
        wrap_in_place(copied, "forward", Compiled(type(block), backend), innermost=True)
        return copied

    double = nn.ModuleList(map(compiled, flux.mmdit.double_blocks))
    single = nn.ModuleList(map(compiled, flux.mmdit.single_blocks))
    mmdit = shallow_copy(flux.mmdit, double_blocks=double, single_blocks=single)
    mark(mmdit, "compiled")
    return replace(flux, mmdit=mmdit)


@lru_cache
def graph_of(kind: type[nn.Module], backend: str | Callable) -> Callable:
    """One graph for all blocks of a kind."""
    # Note: the function of the class, to which the block is one more input; the block's own method
    # would make each block another graph.
    return torch.compile(kind.forward, backend=backend, dynamic=True)


class Compiled:
    """Wraps a block's `forward`; when it is unpickled, it compiles again."""

    def __init__(self, kind: type[nn.Module], backend: str | Callable):
        self.kind = kind
        self.backend = backend

    def __call__(self, block: nn.Module, call: Callable, *inputs) -> Tensor | tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            # Note: a view of another tensor would be a graph of its own, and the first block's
            # inputs may be views.
            inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        return graph_of(self.kind, self.backend)(block, *inputs)
