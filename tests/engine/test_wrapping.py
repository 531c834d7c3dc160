"""Wrapped networks. Oracle: the network itself, and arithmetic."""

import copy
import gc
import pickle
import weakref

import torch
from torch import nn

from miniflux.engine.wrapping import shallow_copy, wrap_forward, wrap_in_place


def double(module, call, x):
    return 2 * call(x)


def add_ten(module, call, x):
    return 10 + call(x)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_the_last_wrapper_is_the_outermost_unless_it_is_asked_to_be_innermost():
    x, base = torch.randn(2, 3), layer()
    wrapped = wrap_forward(wrap_forward(base, double), add_ten)
    assert torch.equal(wrapped(x), 10 + 2 * base(x))
    wrap_in_place(wrapped, "forward", add_ten, innermost=True)
    assert torch.equal(wrapped(x), 10 + 2 * (10 + base(x)))


def test_the_given_network_stays_as_it_is_and_shares_its_weights():
    base = layer()
    wrapped = wrap_forward(base, double)
    assert "forward" not in vars(base) and wrapped.weight is base.weight


def test_copies_of_a_wrapped_network_compute_with_their_own_weights():
    x, wrapped = torch.ones(1, 3), wrap_forward(layer(), double)
    expected = wrapped(x)
    copies = shallow_copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))
    for copied in copies:
        assert torch.equal(copied(x), expected)
        copied.bias = nn.Parameter(copied.bias + 1)
        assert torch.allclose(copied(x), expected + 2) and torch.equal(wrapped(x), expected)


def test_a_wrapped_network_goes_when_nobody_has_it_any_more():
    """A circle of references would keep its weights until Python looks for circles."""
    gc.disable()
    try:
        wrapped = wrap_forward(layer(), double)
        weight = weakref.ref(wrapped.weight)
        del wrapped
        assert weight() is None
    finally:
        gc.enable()
