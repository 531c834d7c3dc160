"""The compiled modules; everything else is in pyproject.toml.

    miniflux._cpu        csrc/reference.cpp and csrc/cpu/: needs a C++17 compiler with OpenMP
    miniflux._cuda       csrc/cuda/: needs nvcc as well; no driver and no GPU

Both are optional: where one cannot be built, the package is installed without it, and PyTorch's own
operations do its work. `python -m miniflux.networks.native` shows which are in use.

MINIFLUX_CUDA=1 builds _cuda even where the installed PyTorch has no CUDA (it takes minutes), and 0
never builds it. MINIFLUX_REQUIRE_NATIVE=1 makes a failed build an error.
"""

import os
import platform
import shutil
import subprocess
import sys
from distutils.errors import CompileError
from glob import glob

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# Sums may be reordered, so that they can be vectorised; NaN and infinity keep their meaning.
FLAGS = [
    "-O3", "-Wall", "-Wextra", "-fopenmp",
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")
OPTIONAL = os.environ.get("MINIFLUX_REQUIRE_NATIVE") != "1"
NVCC = shutil.which("nvcc")
# A100, H100, RTX 50, and code that newer ones translate.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_120,code=[sm_120,compute_120]",
]
# Note: what does not fit into registers would be slow, so a spill is an error.
CUDA_FLAGS = [
    "-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Werror=all-warnings", "-Xptxas=-warn-spills", "-Xptxas=-warn-lmem-usage", *ARCHITECTURES,
]


def wants_cuda() -> bool:
    """Whether to build _cuda: as MINIFLUX_CUDA says, else where the installed PyTorch has CUDA."""
    if NVCC is None or "MINIFLUX_CUDA" in os.environ:
        return NVCC is not None and os.environ["MINIFLUX_CUDA"] != "0"
    # Note: -I looks past the build's own, isolated environment at the one that is installed into.
    code = "import torch; raise SystemExit(torch.version.cuda is None)"
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True).returncode == 0


class BuildExtensions(build_ext):
    def build_extension(self, extension):
        if not any(source.endswith(".cu") for source in extension.sources):
            return super().build_extension(extension)
        output = self.get_ext_fullpath(extension.name)
        os.makedirs(os.path.dirname(output), exist_ok=True)
        includes = [f"-I{folder}" for folder in (pybind11.get_include(), *self.include_dirs)]
        command = [NVCC, "-shared", *CUDA_FLAGS, *includes, *extension.sources, "-o", output]
        try:                                                # nvcc links as well
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error


extensions = [
    Pybind11Extension(
        "miniflux._cpu", ["csrc/reference.cpp", *sorted(glob("csrc/cpu/*.cpp"))], cxx_std=17,
        depends=["csrc/attention.h", *glob("csrc/cpu/*.h")],
        extra_compile_args=FLAGS, extra_link_args=["-fopenmp"], optional=OPTIONAL),
]
if wants_cuda():
    extensions.append(Pybind11Extension(
        "miniflux._cuda", ["csrc/cuda/kernels.cu", "csrc/cuda/bind.cpp"],
        depends=["csrc/attention.h", *glob("csrc/cuda/*.*h")], optional=OPTIONAL))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
