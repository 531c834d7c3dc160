"""Bytes -> named tensors: a reader of safetensors files that maps the tensors from disk.

    8 bytes      N, little-endian
    N bytes      JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {}}
    the rest     the tensors, one after the other without gaps; offsets count from here

Mapping a file piece by piece lets the system take back each piece as soon as its tensors have been
converted or concatenated with others: loading never holds a checkpoint twice. A header is not
trusted: every number in it is checked against the file. Nothing is ever unpickled.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import read_json

MAX_HEADER = 100_000_000
SPAN = 16 << 20            # bytes that one mapping covers at least
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
SAFETENSORS = (".safetensors", ".sft")      # the second is the name of the first official files
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Entry(NamedTuple):
    """Where a tensor lies, in bytes from the end of the header, and what it is."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: list[int]


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The checked header of a safetensors file, in the data's order, and where the data begin."""
    def bad(why: str) -> ValueError:
        return ValueError(f"{path} is not a complete safetensors file: {why}; "
                          "download or save it again")

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a safetensors file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise bad(f"it has {size:,} bytes, its header claims {length:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=without_duplicates)
        header.pop("__metadata__", None)
        entries = {name: read_entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad(f"its header cannot be read ({type(error).__name__}: {str(error):.80})") from None
    for name, (begin, end, dtype, shape) in entries.items():
        if not name.isprintable() or len(name) > 200:
            raise bad(f"a tensor has the name {name!r:.80}")
        # Note: the product without zeros, as an empty tensor too may be too large to have strides.
        too_large = len(shape) > 8 or math.prod(n or 1 for n in shape) > 2**48
        if too_large or end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(f"tensor {name} has {end - begin:,} bytes, "
                      f"which is not {str(shape):.80} in {dtype}")
    entries = dict(sorted(entries.items(), key=lambda item: item[1][:2]))
    ends = [0, *(entry.end for entry in entries.values())]
    for (name, entry), expected in zip(entries.items(), ends):
        if entry.begin != expected:
            raise bad(f"tensor {name} begins at byte {entry.begin:,}, "
                      f"the one before it ends at {expected:,}")
    if ends[-1] != size - 8 - length:
        raise bad(f"its tensors take {ends[-1]:,} bytes, it has {size - 8 - length:,}")
    return entries, 8 + length


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors."""
    read_header(path)                                       # refuses what is not such a file
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def read_entry(entry: dict) -> Entry:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], entry["shape"]
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"shape {str(shape):.40}, offsets {str(begin):.20}, {str(end):.20}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown type {str(dtype):.20}")
    return Entry(begin, end, DTYPES[dtype], shape)


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def read_safetensors(path: str | os.PathLike,
                     apart: Callable[[str], bool] = lambda name: False) -> dict[str, Tensor]:
    """All tensors of a file, in the order of the data, mapped from disk (a change in memory is not
    written back).

    apart: whether the tensor of a name shares no mapping with the others, so that the memory of
        those that do not is free when the last of them is dropped.

    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupt or of another
    format."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise unsafe(path)
    entries, start = read_header(path)
    size, tensors = path.stat().st_size, {}
    # Note: a mapping keeps its file open, and a process may have as few as 256 open files:
    # neighbours share a mapping.
    pieces = {True: (0, np.empty(0, np.uint8)), False: (0, np.empty(0, np.uint8))}
    for name, (begin, end, dtype, shape) in entries.items():
        kind = apart(name)
        if end > pieces[kind][0] + len(pieces[kind][1]):
            length = min(max(SPAN, size // 40, end - begin), size - start - begin)
            piece = np.memmap(path, np.uint8, mode="c", offset=start + begin, shape=length)
            pieces[kind] = begin, piece
        origin, piece = pieces[kind]
        tensors[name] = view(piece[begin - origin:end - origin], dtype, shape)
    return tensors


# Switches of the reading below. Note: context variables, as each thread has its own.
_meta = ContextVar("meta", default=False)
_on_disk = ContextVar("on_disk", default=False)


@contextmanager
def meta_tensors():
    """Within, matrices are read as meta tensors, which have a shape and a dtype but no elements."""
    token = _meta.set(True)
    try:
        yield
    finally:
        _meta.reset(token)


@contextmanager
def concat_on_disk():
    """Within, what is concatenated from several tensors of a file is mapped from a file again."""
    token = _on_disk.set(True)
    try:
        yield
    finally:
        _on_disk.reset(token)


def cat(tensors: list[Tensor]) -> Tensor:
    """The rows of all tensors."""
    is_large = sum(tensor.nbytes for tensor in tensors) > SPAN // 16
    is_plain = len({tensor.dtype for tensor in tensors}) == 1 and not tensors[0].is_meta
    return spill([tensors])[0] if _on_disk.get() and is_large and is_plain else torch.cat(tensors)


def view(data: np.ndarray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Bytes as a tensor; without a copy, unless they lie at an odd address (after a header of odd
    length)."""
    if _meta.get() and len(shape) > 1 and dtype.is_floating_point:
        return torch.empty(shape, dtype=dtype, device="meta")
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    if data.ctypes.data % dtype.itemsize:
        data = np.array(data)
    return torch.from_numpy(data).view(dtype).view(shape)


def spill(groups: list[list[Tensor]]) -> list[Tensor]:
    """The rows of each group's tensors, mapped from a file without a name in the folder for
    temporary files, which is deleted when they are."""
    if not groups:
        return []
    sizes = [sum(tensor.nbytes for tensor in group) for group in groups]
    folder, need = tempfile.gettempdir(), sum(sizes)
    if (free := shutil.disk_usage(folder).free) < need:
        raise ValueError(f"{need / 1e9:.1f} GB of this model are not in a file as they are, and "
                         f"{folder} has {free / 1e9:.1f} GB free: set TMPDIR to a folder with "
                         "more, or load a checkpoint in its own dtype, in the original layout")
    # Note: a matrix that is stored by columns stays so.
    turned = [len(group) == 1 and group[0].ndim == 2 and group[0].stride(0) == 1
              for group in groups]
    with tempfile.TemporaryFile(dir=folder) as file:
        begins = []
        for group, by_columns in zip(groups, turned):
            begins.append(file.seek(-file.tell() % 64, os.SEEK_CUR))
            for tensor in group:
                rows = (tensor.t() if by_columns else tensor).detach().contiguous()
                file.write(memoryview(rows.flatten().view(torch.uint8).numpy()))
        file.flush()
        data, pieces = np.memmap(file, np.uint8, mode="c"), []
    for group, begin, size, by_columns in zip(groups, begins, sizes, turned):
        shape = group[0].t().shape if by_columns else (sum(map(len, group)), *group[0].shape[1:])
        piece = view(data[begin:begin + size], group[0].dtype, list(shape))
        pieces.append(piece.t() if by_columns else piece)
    return pieces


def unsafe(path: Path) -> ValueError:
    return ValueError(f"{path} is a pickle, which can run any code when it is opened: "
                      "convert it to safetensors")


def read_sharded(folder: Path, stem: str,
                 apart: Callable[[str], bool] = lambda name: False) -> dict[str, Tensor]:
    """All tensors of a folder: of `stem.safetensors`, or of the shards that its index names; else
    of the only variant of it, such as `stem.fp16.safetensors`."""
    file = find_weights(folder, stem)
    if file.suffix != ".json":
        return read_safetensors(file, apart)
    tensors: dict[str, Tensor] = {}
    weight_map = read_weight_map(file)
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} does not exist, though {file.name} names "
                                    "it: finish the download")
        tensors |= read_safetensors(folder / shard, apart)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"the shards of {file} lack {listing(missing)}")
    return tensors


def find_weights(folder: Path, stem: str) -> Path:
    """The file of weights of a folder, or the index of its shards."""
    usual = [folder / f"{stem}.safetensors.index.json",
             *(folder / f"{stem}{suffix}" for suffix in SAFETENSORS)]
    if found := [path for path in usual if path.exists()]:
        return found[0]
    # Note: diffusers writes stem.safetensors.index.fp16.json, others
    # stem.fp16.safetensors.index.json.
    variants = sorted(path for path in folder.glob(f"{stem}.*")
                      if re.search(r"\.index(\.\w+)?\.json$", path.name)
                      or path.suffix in SAFETENSORS and not re.search(r"-of-\d+\.", path.name))
    if len(variants) > 1:
        raise ValueError(f"{folder} has the weights {listing([path.name for path in variants])}: "
                         f"leave one of them, or call one {stem}.safetensors")
    if variants:
        return variants[0]
    if pickles := sorted(path for path in folder.glob("*") if path.suffix in PICKLES):
        raise unsafe(pickles[0])
    return folder / f"{stem}.safetensors"


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: the shard that holds it}, from the index of a folder's shards."""
    weight_map = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(shard, str) for shard in shards):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    for shard in weight_map.values():
        if Path(shard).name != shard or not shard.endswith(SAFETENSORS):
            raise ValueError(f"{index} names the file {shard!r:.80}: "
                             "expected a safetensors file within its own folder")
    return weight_map


def listing(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name)[1:-1][:100] for name in names[:5]) + more
