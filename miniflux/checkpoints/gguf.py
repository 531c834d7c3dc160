"""GGUF files: llama.cpp's format for quantised transformers and T5 encoders.

    "GGUF", version, number of tensors, number of keys      little-endian
    keys         name, type, value
    tensors      name, dimensions (the innermost first), type, offset
    data         aligned; offsets count from here

The tensors stay on disk, mapped; the quantised ones stay as they are (`QuantizedTensor`). A header
is not trusted: every count and offset is checked against the file before it is used.

Reference: ggml's `docs/gguf.md`; `gguf` of gguf-py.
"""

import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .blocks import BLOCKS, OTHER_BLOCKS
from .formats import view
from .quantized import QuantizedTensor, State

PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
KINDS = {number: (kind, numbers, size) for kind, (number, numbers, size, _) in BLOCKS.items()}
# Bytes of a value of each type.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, UINT32 = 8, 9, 4
MAX_TENSORS, MAX_KEYS, MAX_NAME = 65_536, 65_536, 1 << 16


class Header:
    """Reads the header from the front, never beyond its end."""

    def __init__(self, data: np.ndarray):
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.place:
            raise ValueError("it ends within its header")
        self.place += count
        return self.data[self.place - count:self.place].tobytes()

    def number(self, form: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        if (length := self.number("Q")) > MAX_NAME:
            raise ValueError(f"a name of {length:,} bytes")
        return self.take(length).decode("utf-8", "replace")

    def skip_value(self, kind: int) -> None:
        if kind == STRING:
            self.take(self.number("Q"))
        elif kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in SIZES:
                self.take(count * SIZES[kind])
            elif kind == STRING:
                for _ in range(count):      # each takes 8 bytes at least: this ends with the file
                    self.take(self.number("Q"))
            else:
                raise ValueError(f"an array of the unknown type {kind}")
        else:
            self.take(SIZES[kind])


def read_gguf(path: Path) -> State:
    """All tensors of a file in torch's shapes, mapped from disk; a quantised one is a
    `QuantizedTensor`.

    Raises FileNotFoundError; ValueError for a file that is truncated or corrupt, or that holds
    tensors in a format that is not read here."""
    with one_sentence(path):
        data = mapped(path)
        entries, start = read_header(Header(data))
    for name, (_, kind, _) in entries.items():
        if kind in OTHER_BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"{path}: the tensor {name} is in the format {OTHER_BLOCKS[kind]}, "
                             f"which is not read here: expected one of F32, F16, BF16, {known}")
    with one_sentence(path):
        return {name: read_tensor(data[start:], *entry) for name, entry in entries.items()}


def gguf_names(path: Path) -> list[str]:
    """The names of a file's tensors, from its header."""
    with one_sentence(path):
        return list(read_header(Header(mapped(path)))[0])


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, which stay on disk."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a GGUF file")
    return np.memmap(path, np.uint8, mode="c") if path.stat().st_size else np.empty(0, np.uint8)


@contextmanager
def one_sentence(path: Path):
    """What goes wrong within is a ValueError that names the file."""
    try:
        yield
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise ValueError(f"{path} is not a complete GGUF file of a known kind ({str(error):.100}): "
                         "download or save it again") from None


def read_header(header: Header) -> tuple[dict[str, tuple], int]:
    """{name: (shape, type, offset)}, and where the data begin."""
    if header.take(4) != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("it does not begin with GGUF, version 2 or 3")
    tensors, keys, alignment, entries = header.number("Q"), header.number("Q"), 32, {}
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise ValueError(f"its header claims {tensors:,} tensors and {keys:,} keys")
    for _ in range(keys):
        name, kind = header.text(), header.number("I")
        if name == "general.alignment" and kind == UINT32:
            alignment = header.number("I")
        else:
            header.skip_value(kind)
    if not 1 <= alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment}")
    for _ in range(tensors):
        name, dims = header.text(), header.number("I")
        if dims > 4 or name in entries or not name.isprintable():
            raise ValueError(f"tensor {name!r:.60} has {dims} dimensions, or occurs twice")
        # Note: the innermost dimension comes first in the file.
        shape = tuple(header.number("Q") for _ in range(dims))[::-1]
        entries[name] = shape, header.number("I"), header.number("Q")
    return entries, header.place + -header.place % alignment


def read_tensor(data: np.ndarray, shape: tuple[int, ...], kind: int,
                offset: int) -> torch.Tensor | QuantizedTensor:
    count = 1
    for side in shape:
        count *= side
        if not 0 < side or count > 1 << 48:
            raise ValueError(f"a tensor of the shape {str(shape):.60}")
    if kind in PLAIN:
        size, numbers = PLAIN[kind].itemsize, 1
    elif kind in KINDS:
        name, numbers, size = KINDS[kind]
    else:
        raise ValueError(f"a tensor of the type {kind}, which is not read here")
    if numbers > 1 and (not shape or shape[-1] % numbers):
        raise ValueError(f"a tensor of the shape {str(shape):.60} in blocks of {numbers}")
    length = count // numbers * size
    if offset + length > len(data):
        raise ValueError("its data end too early")
    piece = data[offset:offset + length]
    if kind in PLAIN:
        return view(piece, PLAIN[kind], list(shape))
    rows = torch.from_numpy(piece).view(count // shape[-1], -1)
    return QuantizedTensor(name, torch.Size(shape), {"q": rows})
