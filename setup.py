"""The compiled module; everything else is in pyproject.toml.

    miniflux._cpu        csrc/reference.cpp and csrc/cpu/: needs a C++17 compiler with OpenMP

It is optional: where it cannot be built, the package is installed without it, and PyTorch's own operations do its work.
MINIFLUX_REQUIRE_NATIVE=1 makes a failed build an error. `python -m miniflux.engine.native` says what there is.
"""

import os
import platform
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# Sums may be reordered, so that they can be vectorised; NaN and infinity keep their meaning.
FLAGS = ["-O3", "-Wall", "-Wextra", "-fopenmp", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")

setup(ext_modules=[
    Pybind11Extension("miniflux._cpu", ["csrc/reference.cpp", *sorted(glob("csrc/cpu/*.cpp"))], cxx_std=17,
                      depends=["csrc/attention.h", *glob("csrc/cpu/*.h")], extra_compile_args=FLAGS, extra_link_args=["-fopenmp"],
                      optional=os.environ.get("MINIFLUX_REQUIRE_NATIVE") != "1"),
])
