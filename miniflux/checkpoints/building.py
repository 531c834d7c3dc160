"""Named tensors + sizes -> a network that holds these very tensors.

Networks are built on the meta device, which allocates nothing, and then take the tensors of the
file as their own, strictly: a missing or unexpected tensor, or a wrong shape, is an error. Sizes
that a config.json brings are checked before they are used.
"""

import math
from dataclasses import Field, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .formats import listing
from .quantized import QuantizedLinear, QuantizedTensor, State

Network = TypeVar("Network", bound=nn.Module)
# Numbers of a config that may be 0 or negative.
SIGNED = ("shift_factor", "base_shift", "max_shift")


class WithoutInitialisation(TorchFunctionMode):
    """Leaves out `torch.nn.init`: what it would write is replaced anyway, and on the meta device it
    imports a compiler (1 s)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(kind: type[Network], config, state: State, source: Path, device: torch.device | str,
          dtype: torch.dtype | None) -> Network:
    """kind(config) with the tensors of `state`, each converted and moved on its own.

    Empties `state`, so that no second copy of the weights stays in memory."""
    try:
        with torch.device("meta"), WithoutInitialisation():
            network = kind(config)
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{source}: there is no {kind.__name__} of these sizes: {why}") from None
    expected = network.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{source} is not a {kind.__name__} of these sizes: "
                         + "; ".join(f"{what} {listing(names)}" for what, names in
                                     (("missing", missing), ("unexpected", unexpected)) if names))
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{source}: {name} has the shape {list(state[name].shape)}, "
                             f"expected {list(tensor.shape)}")
        if not state[name].is_floating_point():
            raise ValueError(f"{source}: {name} holds {state[name].dtype}, "
                             "expected floating-point numbers")
    for name in expected:
        module, _, attribute = name.rpartition(".")
        owner, tensor = network.get_submodule(module), state.pop(name)
        if isinstance(tensor, QuantizedTensor):
            if attribute == "weight" and isinstance(owner, nn.Linear):
                layer = quantized_linear(owner, tensor, torch.device(device), dtype)
                network.set_submodule(module, layer)
                continue
            tensor = tensor.dequantize()
        tensor = place(tensor, torch.device(device), dtype)
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
    return network.eval()


def quantized_linear(linear: nn.Linear, weight: QuantizedTensor, device: torch.device,
                     dtype: torch.dtype | None) -> QuantizedLinear:
    """The layer with a quantised weight, and the bias that it has so far."""
    layer = QuantizedLinear(weight, dtype or torch.float32, device)
    layer.bias = linear.bias
    return layer


def place(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """The tensor on its device, in its dtype; still mapped from the file if neither changes."""
    if device.type == "cpu" and dtype == torch.float32 != tensor.dtype and tensor.ndim == 2:
        # Note: a matrix that must be copied anyway is stored by columns: so the CPU multiplies few
        # rows faster.
        return torch.empty(tensor.shape[::-1], dtype=dtype).copy_(tensor.t()).t()
    return tensor.to(device=device, dtype=dtype)


def pick(kind: type, values: dict, names: dict[str, str], source: Path):
    """A config from JSON: names[our field] = their key; a key that is absent keeps our default."""
    chosen = {field.name: checked(field, names[field.name], values[names[field.name]], source)
              for field in fields(kind) if names.get(field.name) in values}
    try:
        return kind(**chosen)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def checked(field: Field, key: str, value, source: Path):
    """The value of a config's key, if it is what the field holds: a believable size or number."""
    limit = 1_000 if field.name.startswith(("num_", "depth")) else 1_000_000
    least = field.metadata.get("least", 1)

    def is_size(n) -> bool:
        return type(n) is int and least <= n <= limit

    if value is None and field.default is None:
        return None
    if field.type is str:
        good, expected = isinstance(value, str) and len(value) < 100, "a word"
    elif field.type is int:
        good, expected = is_size(value), f"a whole number from {least} to {limit:,}"
    elif field.type in (float, float | None):
        is_number = type(value) in (int, float) and math.isfinite(value)
        good, expected = is_number and (value > 0 or field.name in SIGNED), "a positive number"
        if field.name in SIGNED:
            expected = "a number"
    elif field.type is bool:
        good, expected = isinstance(value, bool), "true or false"
    else:
        is_short = isinstance(value, list) and 0 < len(value) <= 8
        good, expected = is_short and all(map(is_size, value)), "a short list of sizes"
    if not good:
        raise ValueError(f"{source}: {key} is {value!r:.60}, expected {expected}")
    return tuple(value) if isinstance(value, list) else value


def check_class(config: dict, expected: tuple[str, ...], source: Path) -> None:
    """Refuses the folder of another model by the class its config.json names."""
    architectures = config.get("architectures")
    first = architectures[0] if architectures and isinstance(architectures, list) else None
    found = config.get("_class_name") or first
    if found is not None and found not in expected:
        raise ValueError(f"{source} describes a {found!r:.60}, expected a {expected[0]}")
