// The module miniflux._cuda. Addresses come as integers and steps in elements from miniflux/networks/native.py, which has checked them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;

template <typename T, void (*kernel)(const Problem<T>&, void*)>
static void call(Sizes sizes, uintptr_t qkv, Steps steps, uintptr_t text, uintptr_t image, uintptr_t pe, uintptr_t out,
                 uintptr_t stream) {
    auto p = problem<T>(sizes, qkv, steps, text, image, pe, out);
    if (p.B * p.H * p.S * p.D) kernel(p, reinterpret_cast<void*>(stream));       // CUDA has no grid of no blocks
}

template <typename T> static void offer(py::module_& module, const std::string& type) {
    module.def(("norm_rope_" + type).c_str(), call<T, norm_rope<T>>);
    module.def(("naive_" + type).c_str(), call<T, naive<T>>);
    module.def(("tiles_" + type).c_str(), call<T, tiles<T>>);
    module.def(("mma_" + type).c_str(), call<T, mma<T>>);
    module.def(("wgmma_" + type).c_str(), call<T, wgmma<T>>);
    module.def(("attention_" + type).c_str(), call<T, attention<T>>);
}

PYBIND11_MODULE(_cuda, module) {
    offer<float>(module, "float32");
    offer<__half>(module, "float16");
    offer<__nv_bfloat16>(module, "bfloat16");
}
