"""Registers and shared memory of every CUDA kernel as nvcc counts them, beside csrc/cuda/registers.txt, so that a change is seen.

    python tests/engine/test_registers.py        writes that table anew"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
TABLE = SOURCE / "registers.txt"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_120")                                   # as in setup.py
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}   # as names of functions spell them
REGISTERS, SHARED = 65536, 99 << 10                                             # of a multiprocessor; bytes of a block, on the smallest

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None or not SOURCE.is_dir(), reason="there is no nvcc, or no source here")


def version() -> str:
    return "nvcc " + re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)[1]


def count(architecture: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Registers of a thread and bytes of shared memory of a block (what the launch adds not counted) of each kernel."""
    command = ["nvcc", "-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas=-v", SOURCE / "kernels.cu", "-o", folder / "k"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"entry function '_Z\d+(\w+?)I(f|6__half|13__nv_bfloat16)(?:Li(\d+))?E\w+' for.*?"
                       r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?", said, re.DOTALL)
    assert len(found) == said.count("entry function"), said
    # Note: of products of a group that have to wait for each other ptxas speaks in a remark, not in a warning.
    assert not re.search(r"C75\d\d|[1-9]\d* bytes (?:stack frame|spill)", said), said
    return {f"{name} {TYPES[T]} {width}".strip(): (int(registers), int(shared or 0)) for name, T, width, registers, shared in found}


def table(folder: Path) -> str:
    counts = [count(architecture, folder) for architecture in ARCHITECTURES]
    lines = [f"{version():32}" + "".join(f"{name:>8}" for name in ARCHITECTURES) + f"{'shared':>10}"]
    for kernel in sorted(counts[0], key=lambda kernel: [int(word) if word.isdigit() else word for word in kernel.split()]):
        shared, = {found[kernel][1] for found in counts}
        lines.append(f"{kernel:32}" + "".join(f"{found[kernel][0]:8}" for found in counts) + f"{shared:10}")
    return "\n".join(lines) + "\n"


def test_registers_and_shared_memory_are_those_of_the_table(tmp_path):
    """With another nvcc than the table's the numbers may be others: then only the kernels are compared."""
    ours, theirs = table(tmp_path).splitlines(), TABLE.read_text().splitlines()
    if ours[0] != theirs[0]:
        ours, theirs = ([line[:32] for line in lines[1:]] for lines in (ours, theirs))
    assert ours == theirs, "if this is meant: python tests/engine/test_registers.py"


def test_two_blocks_of_tensor_cores_have_room_on_every_multiprocessor():
    for line in TABLE.read_text().splitlines():
        if line.startswith("attention_mma"):
            *registers, shared = map(int, line[32:].split())
            assert 2 * 128 * max(registers) <= REGISTERS and 2 * shared <= SHARED


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        TABLE.write_text(table(Path(folder)))
