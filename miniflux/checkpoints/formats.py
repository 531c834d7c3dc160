"""Bytes -> named tensors: a reader of safetensors files that maps each tensor from disk on its own.

    8 bytes      N, little-endian
    N bytes      JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest     the tensors; offsets count from here

Mapping tensor by tensor lets the system take back each one as soon as it has been converted or joined with others:
loading never holds a checkpoint twice. A header is not trusted: every number in it is checked against the file.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


def read_header(path: Path) -> tuple[dict, int]:
    """The checked header of a safetensors file and the position where its data begin."""
    def bad(why: str) -> ValueError:
        return ValueError(f"{path} is not a complete safetensors file: {why}; download or save it again")

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a safetensors file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise bad(f"it has {size:,} bytes, its header claims {length:,}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in tensors.items():
                begin, end = entry["data_offsets"]
                dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
                if dtype is None:
                    raise bad(f"tensor {name} has the unknown type {entry['dtype']}")
                if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
                    raise bad(f"tensor {name} has the shape {shape} and the offsets {begin}, {end}")
                if end > size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
                    raise bad(f"tensor {name} {shape} should lie at bytes {begin:,} to {end:,} of {size - 8 - length:,}")
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise bad(f"its header cannot be read ({type(error).__name__})") from None
        except ValueError as error:
            raise error if str(path) in str(error) else bad("its header cannot be read") from None
    return tensors, 8 + length


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a file, mapped from disk (a change in memory is not written back).

    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupt or of another format."""
    path = Path(path)
    tensors, start = read_header(path)
    return {name: map_tensor(path, start + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"])
            for name, entry in tensors.items()}


def map_tensor(path: Path, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    data = np.memmap(path, np.uint8, mode="c", offset=offset, shape=math.prod(shape) * dtype.itemsize)
    if data.ctypes.data % dtype.itemsize:                   # a header of odd length: copy to an aligned place
        data = np.array(data)
    return torch.from_numpy(data).view(dtype).view(shape)


def read_sharded(folder: Path, stem: str) -> dict[str, Tensor]:
    """`folder/stem.safetensors`, or all shards that `folder/stem.safetensors.index.json` names."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / f"{stem}.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the file {shard!r}: expected a name within its own folder")
        tensors |= read_safetensors(folder / shard)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"the shards of {index} lack {listing(missing)}")
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one sentence why not."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a JSON file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def listing(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
