"""Checks of what a caller gives: numbers of any library, switches, functions."""

import math
import numbers
import operator

import numpy as np


def quote(value: object) -> str:
    """The value as it would be written in code, on one line of at most 60 characters."""
    return f"{' '.join(repr(value).split()):.60}"


def check_number(name: str, value, low: float, high: float = math.inf, whole: bool = False):
    """The value as a Python number in [low, high]; a whole one if asked for.

    Numbers of NumPy and PyTorch count, also in arrays and tensors without dimensions; booleans do
    not.
    Raises ValueError for everything else."""
    number = to_number(value, whole)
    if number is None or not math.isfinite(number) or not low <= number <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} is {quote(value)}: expected a {'whole ' * whole}number {limits}")
    return number


def to_number(value, whole: bool = False) -> int | float | None:
    """The value as an int or a float; None if it is neither."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        pass
    is_scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    try:
        return float(value) if is_scalar and not whole else None
    except (TypeError, ValueError, OverflowError):
        return None


def check_switch(name: str, value) -> bool:
    """The value as True or False. Raises ValueError for everything else, also for "no"."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError(f"{name} is {quote(value)}: expected True or False")


def check_function(name: str, value) -> None:
    """Raises ValueError unless the value is None or can be called."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} is {quote(value)}: expected a function, or None")
