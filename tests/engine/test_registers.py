"""Registers and shared memory of every CUDA kernel, as nvcc counts them.

They must equal the table csrc/cuda/registers.txt, so that no change goes unnoticed.

    python tests/engine/test_registers.py        writes that table anew"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
TABLE = SOURCE / "registers.txt"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_120")               # as in setup.py
# Types as they are spelled in the names of compiled functions.
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
REGISTERS = 65536                                           # of a multiprocessor
SHARED = 99 << 10                                           # bytes of a block, on the smallest GPU

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or not SOURCE.is_dir(),
    reason="there is no nvcc, or no source here",
)


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def version() -> str:
    return "nvcc " + re.search(r"V([\d.]+)", run("nvcc", "--version").stdout)[1]


def count(architecture: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Registers of a thread, and bytes of shared memory of a block, of each kernel.

    The shared memory that is added at the launch is not counted."""
    flags = ["-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas=-v"]
    report = run("nvcc", *flags, SOURCE / "kernels.cu", "-o", folder / "k").stderr
    found = re.findall(
        r"entry function '_Z\d+(\w+?)I(f|6__half|13__nv_bfloat16)(?:Li(\d+))?E\w+' for.*?"
        r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?", report, re.DOTALL)
    assert len(found) == report.count("entry function"), report
    # Note: if products of a group wait for each other, ptxas prints a remark, not a warning.
    assert not re.search(r"C75\d\d|[1-9]\d* bytes (?:stack frame|spill)", report), report
    counts = {}
    for name, T, width, registers, shared in found:
        kernel = f"{name} {TYPES[T]} {width}".strip()
        counts[kernel] = int(registers), int(shared or 0)
    return counts


def table(folder: Path) -> str:
    counts = [count(architecture, folder) for architecture in ARCHITECTURES]
    heads = "".join(f"{name:>8}" for name in ARCHITECTURES)
    lines = [f"{version():32}{heads}{'shared':>10}"]
    for kernel in sorted(counts[0], key=words_and_numbers):
        registers = "".join(f"{found[kernel][0]:8}" for found in counts)
        shared, = {found[kernel][1] for found in counts}
        lines.append(f"{kernel:32}{registers}{shared:10}")
    return "\n".join(lines) + "\n"


def words_and_numbers(kernel: str) -> list[str | int]:
    return [int(word) if word.isdigit() else word for word in kernel.split()]


def test_registers_and_shared_memory_are_those_of_the_table(tmp_path):
    """Another nvcc than the table's may count differently: then only the kernels are compared."""
    found = table(tmp_path).splitlines()
    expected = TABLE.read_text().splitlines()
    if found[0] != expected[0]:
        found = [line[:32] for line in found[1:]]
        expected = [line[:32] for line in expected[1:]]
    assert found == expected, "if this is intended: python tests/engine/test_registers.py"


def test_two_blocks_of_tensor_cores_fit_on_every_multiprocessor():
    for line in TABLE.read_text().splitlines():
        if line.startswith("attention_mma"):
            *registers, shared = map(int, line[32:].split())
            assert 2 * 128 * max(registers) <= REGISTERS
            assert 2 * shared <= SHARED


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        TABLE.write_text(table(Path(folder)))
