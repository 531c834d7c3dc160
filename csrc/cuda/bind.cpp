// The module miniflux._cuda. Addresses come as integers and steps in elements from miniflux/engine/native.py, which has checked them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;

// sizes: B, H, S, L, D; steps of qkv (B, S, 3, H, D): batch, token, from q to k to v, head.
template <typename T, void (*kernel)(const Problem<T>&, void*)>
static void call(std::array<int64_t, 5> sizes, uintptr_t qkv, std::array<int64_t, 4> steps, uintptr_t text, uintptr_t image,
                 uintptr_t pe, uintptr_t out, uintptr_t stream) {
    auto [B, H, S, L, D] = sizes;
    auto [batch, token, part, head] = steps;
    auto at = [](uintptr_t address) { return reinterpret_cast<T*>(address); };
    auto rows = [batch = batch, token = token, head = head](T* data) { return Rows<T>{data, batch, head, token}; };
    Problem<T> problem{B, H, S, L, D, rows(at(qkv)), rows(at(qkv) + part), rows(at(qkv) + 2 * part), {at(out), S * H * D, D, H * D},
                       at(text), at(image), reinterpret_cast<const float*>(pe)};
    kernel(problem, reinterpret_cast<void*>(stream));
}

template <typename T> static void offer(py::module_& module, const std::string& type) {
    module.def(("norm_rope_" + type).c_str(), call<T, norm_rope<T>>);
    module.def(("naive_" + type).c_str(), call<T, naive<T>>);
    module.def(("tiles_" + type).c_str(), call<T, tiles<T>>);
}

PYBIND11_MODULE(_cuda, module) {
    offer<float>(module, "float32");
    offer<__half>(module, "float16");
    offer<__nv_bfloat16>(module, "bfloat16");
}
