"""Pages: weights that are mapped from a file and need not stay in the computer's memory.

The system reads a page of a mapped file when one of its bytes is used. `Pages` lets it drop the
pages again once a weight has been used, and announces those that are needed next. So a model of any
size runs in the memory of a few blocks.
"""

import ctypes
import mmap
import re
from pathlib import Path

from torch import Tensor


class Pages:
    """Tensors whose pages can be read from a file again, by address."""

    def __init__(self):
        self.mapped: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> None:
        self.mapped[tensor.data_ptr()] = tensor

    def drop(self, tensor: Tensor) -> None:
        """The pages of this tensor are not needed now."""
        self.advise(tensor, "DONTNEED")

    def announce(self, tensor: Tensor) -> None:
        """The pages of this tensor will be needed soon."""
        self.advise(tensor, "WILLNEED")

    def advise(self, tensor: Tensor, advice: str) -> None:
        # Note: in any other memory, DONTNEED would write zeros; so only tensors that were added are
        # dropped. They are kept here, so that no other tensor can have their address.
        address = tensor.data_ptr()
        if address not in self.mapped:
            return
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        size = address + tensor.nbytes - begin
        advice_code = getattr(mmap, f"MADV_{advice}")
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice_code)


def mapped_ranges() -> list[tuple[int, int]] | None:
    """The addresses at which files are mapped and nothing was changed since; None where the system
    does not list them."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return None
    # A mapping: "begin-end rights offset device inode path", then its properties, a line each.
    mapping = (r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) .*\n"
               r"(?:[A-Z]\w+: .*\n)*?Anonymous: +(\d+)")
    ranges = []
    for begin, end, inode, changed in re.findall(mapping, text, re.M):
        if inode != "0" and changed == "0":
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges


def is_within(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    """Whether all of a tensor lies in one of these ranges."""
    if tensor.device.type != "cpu":
        return False
    begin = tensor.data_ptr()
    end = begin + tensor.nbytes
    return any(low <= begin and end <= high for low, high in ranges)
