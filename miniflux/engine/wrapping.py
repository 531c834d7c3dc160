"""How a network is changed from outside: a copy that shares every weight and computes something
else.

    def twice(module, call, x):             # `call` is the method of `module` as it was
        return 2 * call(x)

    changed = wrap_forward(network, twice)  # changed(x) == 2 * network(x)

The copy has the network's class and the names of its parts, so other changes can be put on top of
it. It can be copied again, and pickled, if the wrapper can.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from types import MethodType

from torch import nn


class WrappedMethod:
    """A method of a module with wrappers around it, the first one innermost. Stands in the module's
    own attributes."""

    def __init__(self, module: nn.Module, name: str, wrappers: tuple[Callable, ...]):
        # Note: a strong reference would make a circle, and the weights would stay until Python
        # looks for circles.
        self.module = weakref.ref(module)
        self.name = name
        self.wrappers = wrappers

    def __call__(self, *inputs, **named):
        module = self.module()
        call = MethodType(getattr(type(module), self.name), module)
        for wrapper in self.wrappers:
            call = partial(wrapper, module, call)
        return call(*inputs, **named)

    def __reduce__(self):
        return WrappedMethod, (self.module(), self.name, self.wrappers)


def wrap_in_place(module: nn.Module, name: str, wrapper: Callable, *,
                  innermost: bool = False) -> None:
    """Put wrapper(module, call, inputs...) around the method `name`: outside of the wrappers it
    has, or inside."""
    before = vars(module)[name].wrappers if name in vars(module) else ()
    wrappers = (wrapper, *before) if innermost else (*before, wrapper)
    setattr(module, name, WrappedMethod(module, name, wrappers))


def shallow_copy(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """A copy that shares everything but the parts that are given."""
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            # Note: parts, weights and hooks: those of the copy may be changed without changing the
            # original's.
            setattr(copied, name, value.copy())
        elif isinstance(value, WrappedMethod):
            setattr(copied, name, WrappedMethod(copied, name, value.wrappers))
    copied._modules.update(parts)
    return copied


def wrap_forward(module: nn.Module, wrapper: Callable, **parts: nn.Module) -> nn.Module:
    """A copy, with these parts, that returns wrapper(module, call, inputs...), where
    call(inputs...) is what the network would have returned."""
    copied = shallow_copy(module, **parts)
    wrap_in_place(copied, "forward", wrapper)
    return copied
