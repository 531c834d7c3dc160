"""Builds the CUDA kernels for the CPU: the source of csrc/cuda itself, over an emulated GPU.

    from emulator.build import build
    library = build()                                       # about a minute with g++

    emulate.h           blocks and threads: each thread is a fiber with a stack of its own
    emulate_warp.h      what a warp does as one: shuffles, copies, tensor cores
    emulate_hopper.h    what an H100 has besides: copies of tiles, their barriers, wgmma
    kernels.cpp         the functions of the library

`run.py` calls it.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-x", "c++")


def missing() -> str | None:
    """Why the kernels cannot be built here; None if they can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    return None if CSRC.is_dir() else f"there is no source in {CSRC}"


def build(folder: Path | None = None, change: tuple[str, str, str] | None = None,
          *flags: str) -> ctypes.CDLL:
    """The emulated kernels as a library.

    folder: where it is built; by default a new temporary folder.
    change: (file of csrc/cuda, text in it, text to put in its place), to try a kernel that is
        changed; the source itself stays as it is.
    flags: further flags of g++, such as "-DONLY_TYPE=float" and "-DONLY_CHANNELS=2", with which
        only one type and one width of heads are compiled, in a quarter of the time.

    Raises ValueError where the text to change is not in the file."""
    folder = Path(tempfile.mkdtemp() if folder is None else folder)
    source = folder / "csrc"
    shutil.copytree(CSRC, source)
    if change:
        name, before, after = change
        text = (source / "cuda" / name).read_text()
        if before not in text:
            raise ValueError(f"{before!r} is not in csrc/cuda/{name}: expected a text to replace")
        (source / "cuda" / name).write_text(text.replace(before, after, 1))
    library = folder / "kernels.so"
    subprocess.run(["g++", *FLAGS, f"-I{source}", f"-I{HERE}", *flags, str(HERE / "kernels.cpp"),
                    "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.error.restype = ctypes.c_char_p
    return loaded
