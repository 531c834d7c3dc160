"""How a network is changed from outside: a copy that shares every weight and does something else when it is called.

    def twice(call, x):                     # `call` is what the network does by itself
        return 2 * call(x)

    changed = around(network, twice)        # changed(x) == 2 * network(x)

The copy has the network's class and the names of its parts, so whatever else changes networks can be put on top of it.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType

from torch import nn


def with_parts(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """A copy that shares everything but the parts that are given."""
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):                         # Note: parts, weights and hooks: the copy's own may then be changed
            vars(copied)[name] = value.copy()
    if "forward" in vars(module):
        copied.forward = MethodType(module.forward.__func__, copied)
    copied._modules.update(parts)
    return copied


def around(module: nn.Module, forward: Callable, **parts: nn.Module) -> nn.Module:
    """A copy, with these parts, that returns forward(call, inputs...), where call(inputs...) is what it would have returned."""
    copied, own = with_parts(module, **parts), module.forward.__func__
    # Note: bound to the copy, so that a copy of the copy, such as one with LoRAs, calls itself.
    copied.forward = MethodType(lambda self, *inputs, **named: forward(partial(own, self), *inputs, **named), copied)
    return copied
