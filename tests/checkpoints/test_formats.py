"""The reader of safetensors files: equal to the safetensors library, sparing with memory, and hard
to fool."""

import gc
import json
import os
import random
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniflux.checkpoints import formats
from miniflux.checkpoints.formats import (
    listing,
    read_json,
    read_safetensors,
    read_sharded,
)
from miniflux.engine.offload import is_within, mapped_ranges

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: dict | list | bytes, data: bytes = bytes(24)) -> Path:
    """A file with just this header, whatever it says."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(ValueError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 400
    return message


# ------------------------------------------------------------------------------------- what is read


def test_tensors_of_every_type_equal_those_the_safetensors_library_reads(tmp_path):
    """Oracle: safetensors.torch.load_file; empty tensors and scalars included."""
    numbers = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 20
    tensors = {str(dtype): numbers.to(dtype) for dtype in formats.DTYPES.values()}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "one": torch.ones(1, 1, 1, 7),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours, theirs = (
        read_safetensors(tmp_path / "a.safetensors"),
        load_file(tmp_path / "a.safetensors"),
    )
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert torch.equal(ours[name].double(), tensor.double())


@pytest.mark.parametrize("padding", range(4))
def test_a_header_of_odd_length_is_read(tmp_path, padding):
    """Oracle: by hand. The library pads headers to multiples of 8; the format does not ask for
    it."""
    header = json.dumps({"a": ENTRY}).encode() + b" " * padding
    path = write(tmp_path / "a.safetensors", header, struct.pack("<6f", 1, 2, 3, 4, 5, 6))
    assert read_safetensors(path)["a"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_change_in_memory_is_not_written_back(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    read_safetensors(tmp_path / "a.safetensors")["a"].zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_pieces_of_the_file_hold_the_tensors_whatever_their_size(tmp_path, monkeypatch):
    """Oracle: the library. Pieces of 1000 bytes: tensors that share one, that need more than one,
    that end with the file."""
    monkeypatch.setattr(formats, "SPAN", 1000)
    tensors = {
        f"t{i}": torch.randn(size)
        for i, size in enumerate([1, 100, 150, 0, 251, 2000, 249, 1, 250, 7])
    }
    save_file(tensors, tmp_path / "a.safetensors")
    ours = read_safetensors(tmp_path / "a.safetensors")
    assert ours.keys() == tensors.keys() and all(
        torch.equal(ours[name], tensor) for name, tensor in tensors.items()
    )


def test_a_file_of_many_tensors_needs_few_open_files(tmp_path):
    """A process may open 1024 files on many systems, 256 on some, and FLUX.1-dev has 1160
    tensors."""
    resource = pytest.importorskip("resource")
    save_file(
        {f"t{i}": torch.full((300,), float(i)) for i in range(1500)}, tmp_path / "a.safetensors"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        tensors = read_safetensors(tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(tensors) == 1500 and all(tensors[f"t{i}"][7] == i for i in range(1500))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_not_in_memory_before_they_are_used(tmp_path):
    """Oracle: how much of this very file the system counts as resident, for a file of 100 MB."""
    path = tmp_path / "a.safetensors"

    def resident() -> int:
        gc.collect()
        sizes = re.findall(
            rf"{re.escape(str(path))}\n(?:.*\n)*?Rss:\s*(\d+) kB",
            Path("/proc/self/smaps").read_text(),
        )
        return sum(map(int, sizes)) // 1000

    save_file({f"t{i}": torch.full((2_500_000,), float(i)) for i in range(10)}, path)
    tensors = read_safetensors(path)
    assert resident() < 10
    assert sum(tensor.sum().item() for tensor in tensors.values()) == 2_500_000 * 45
    assert resident() > 80
    del tensors
    assert resident() == 0


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, -25, -24, -20, -1], ids=str)
def test_a_truncated_file_is_refused(tmp_path, length):
    """Cut within the length, within the header, between header and data, within the data."""
    whole = write(tmp_path / "a.safetensors", {"a": ENTRY}).read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:length])
    assert "is not a complete safetensors file" in refusal(tmp_path / "a.safetensors")


def test_a_file_with_more_data_than_tensors_is_refused(tmp_path):
    assert "its tensors take 24 bytes, it has 25" in refusal(
        write(tmp_path / "a.safetensors", {"a": ENTRY}, bytes(25))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 28]},
        {"data_offsets": [4, 24]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [-24, 0]},
        {"data_offsets": [0, 2**70]},
        {"data_offsets": [0.0, 24.0]},
        {"data_offsets": [False, 24]},
        {"data_offsets": [0, 24, 24]},
        {"data_offsets": "02"},
        {"data_offsets": None},
        {"data_offsets": {"0": 1, "24": 2}},
        {"shape": [2, -3]},
        {"shape": [-2, -3]},
        {"shape": [2**40, 2**40]},
        {"shape": [2.0, 3]},
        {"shape": [True, 6]},
        {"shape": "23"},
        {"shape": None},
        {"shape": {}},
        {"shape": 6},
        {"shape": [[2, 3]]},
        {"shape": [2, 3] + [1] * 100},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F31"},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"dtype": "F64"},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_refused(tmp_path, change):
    refusal(write(tmp_path / "a.safetensors", {"a": ENTRY | change}))


@pytest.mark.parametrize(
    "header",
    [
        {"a": ENTRY, "b": ENTRY},  # on top of each other
        {
            "a": ENTRY | {"shape": [4], "data_offsets": [0, 16]},
            "b": ENTRY | {"shape": [4], "data_offsets": [8, 24]},
        },  # overlapping
        {
            "a": ENTRY | {"shape": [1], "data_offsets": [0, 4]},
            "b": ENTRY | {"shape": [1], "data_offsets": [20, 24]},
        },  # a gap
        {"a": 3},
        {"a": None},
        {"a": {}},
        [],
        ["a"],
        {"a\nb": ENTRY},
        {"a" * 300: ENTRY},
        {"\ud800": ENTRY},
        b"",
        b"{",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
        json.dumps({"a": ENTRY})[:-1].encode()
        + b", "
        + json.dumps({"a": ENTRY})[1:].encode(),  # the same name twice
        random.Random(0).randbytes(500),
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, header):
    refusal(write(tmp_path / "a.safetensors", header))


def test_a_header_longer_than_the_format_allows_is_refused_unread(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}" * 50)
    assert "its header claims 9,223,372,036,854,775,808" in refusal(tmp_path / "a.safetensors")


def test_two_thousand_damaged_headers_are_refused_or_read_within_the_file(tmp_path):
    """Random changes of bytes, digits and structure: never another exception, never a tensor that
    is not in the file."""
    rng, path = random.Random(7), tmp_path / "a.safetensors"
    tensors = {
        "weight": torch.ones(3, 4),
        "bias": torch.ones(4).half(),
        "ids": torch.arange(5),
        "none": torch.empty(2, 0),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(2000):
        header = bytearray(whole[8:end])
        for _ in range(rng.randint(1, 3)):
            at, digits = (
                rng.randrange(len(header)),
                str(rng.randrange(10 ** rng.randint(1, 25))).encode(),
            )
            symbol = bytes([rng.choice(b'0123456789-.,:[]{}"eE')])
            new = rng.choice([rng.randbytes(1), symbol, digits, b"null", b"true", b"[]", b""])
            header[at:at + rng.randint(0, 2)] = new
        length = (
            len(header)
            if rng.random() < 0.8
            else rng.choice([0, len(header) - 1, len(header) + 1, rng.getrandbits(64)])
        )
        with open(path, "r+b") as file:
            file.write(struct.pack("<Q", length) + header + whole[end:])
            file.truncate()
        try:
            read = read_safetensors(path)
            assert sum(tensor.nbytes for tensor in read.values()) <= len(whole)
            [tensor.double().sum() for tensor in read.values()]  # every byte can be read
        except ValueError as error:
            refused += str(path) in str(error)
    assert 1000 < refused < 2000


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        read_safetensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "flux.pt", "flux.pth", "flux.ckpt"])
def test_nothing_is_ever_unpickled(tmp_path, name):
    torch.save({"a": torch.ones(3)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle.*convert it to safetensors"):
        read_safetensors(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle.*convert it to safetensors"):
        read_sharded(tmp_path, "model")


# ------------------------------------------------------------------------------------------- shards


def shards(folder: Path, weight_map) -> Path:
    """Two shards a.safetensors (tensor x) and b.safetensors (tensor y) with an index."""
    save_file({"x": torch.ones(2)}, folder / "a.safetensors")
    save_file({"y": torch.zeros(3)}, folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def test_shards_are_joined(tmp_path):
    tensors = read_sharded(shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}), "model")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "x": [1, 1],
        "y": [0, 0, 0],
    }


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "..", "", "sub/a.safetensors", "a.bin"]
)
def test_an_index_that_names_a_file_outside_its_folder_is_refused(tmp_path, shard):
    with pytest.raises(
        ValueError, match=f"index.json names the file '{shard}': expected a safetensors file within"
    ):
        read_sharded(shards(tmp_path, {"x": shard, "y": "b.safetensors"}), "model")


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="c.safetensors does not exist, though model.safetensors.index.json names it",
    ):
        read_sharded(shards(tmp_path, {"x": "a.safetensors", "z": "c.safetensors"}), "model")


def test_tensors_that_the_shards_lack_are_listed(tmp_path):
    names = {f"z{i}": "b.safetensors" for i in range(8)}
    with pytest.raises(ValueError, match="lack z0, z1, z2, z3, z4 and 3 more"):
        read_sharded(shards(tmp_path, {"x": "a.safetensors"} | names), "model")


@pytest.mark.parametrize(
    "weight_map", [None, [], "a", {"x": 1}, {"x": None}, {"x": ["a.safetensors"]}], ids=str
)
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    with pytest.raises(ValueError, match="has no weight_map"):
        read_sharded(shards(tmp_path, weight_map), "model")


# --------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ("3", "holds a int"),
        ("null", "holds a NoneType"),
    ],
    ids=lambda text: text[:9],
)
def test_what_is_no_json_object_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"config.json {message}"):
        read_json(tmp_path / "config.json")


def test_a_missing_json_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        read_json(tmp_path / "config.json")


def test_a_list_of_names_stays_short():
    assert listing(["a", "b"]) == "a, b"
    assert listing([str(i) for i in range(1000)]) == "0, 1, 2, 3, 4 and 995 more"
    assert listing(["a\nb", "c" * 1000]) == r"a\nb, " + "c" * 100


# ------------------------------------------------------------------------------------- mapped again


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(30, 50),
        torch.randn(50, 30).t(),
        torch.randn(7, dtype=torch.bfloat16),
        torch.randn(4, 3, 3, 3)[:, ::2],
        torch.randint(0, 255, (5, 9), dtype=torch.uint8),
        torch.randn(3, 5).to(torch.float8_e4m3fn),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_spilled_tensors_have_the_same_numbers_and_the_same_order_in_memory(tensor):
    first, mapped = formats.spill([[torch.ones(3)], [tensor]])
    assert torch.equal(mapped.float(), tensor.float())
    assert mapped.dtype == tensor.dtype
    assert torch.equal(first, torch.ones(3))
    assert mapped.stride() == tensor.stride() or not tensor.is_contiguous() and tensor.ndim == 4


def test_many_spilled_tensors_keep_one_file_open():
    """A process may have as few as 256."""
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    mapped = formats.spill([[torch.full((9,), float(i))] for i in range(3000)])
    assert all(float(tensor[8]) == i for i, tensor in enumerate(mapped))
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) <= before + 1


def test_what_is_joined_is_mapped_from_a_file_only_within_the_context():
    big, small = torch.randn(2000, 300), torch.randn(2, 3)
    assert torch.equal(formats.cat([big, big]), torch.cat([big, big]))
    with formats.concat_on_disk():
        joined = formats.cat([big, big])
        assert torch.equal(joined, torch.cat([big, big])) and torch.equal(
            formats.cat([small, small]), torch.cat([small, small])
        )
    if sys.platform == "linux":
        assert is_within(joined, mapped_ranges()) and not is_within(
            formats.cat([big, big]), mapped_ranges()
        )
