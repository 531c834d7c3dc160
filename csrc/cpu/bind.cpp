// The module miniflux._cpu. Addresses come as integers and steps in elements from miniflux/engine/native.py, which has checked them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;

template <typename T, void (*kernel)(const Problem<T>&)>
static void call(Sizes sizes, uintptr_t qkv, Steps steps, uintptr_t text, uintptr_t image, uintptr_t pe, uintptr_t out) {
    auto p = problem<T>(sizes, qkv, steps, text, image, pe, out);
    py::gil_scoped_release others_may_run;
    kernel(p);
}

static void call_linear(std::array<int64_t, 3> sizes, uintptr_t x, uintptr_t w, uintptr_t b, uintptr_t y) {
    auto [M, K, N] = sizes;
    auto at = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
    py::gil_scoped_release others_may_run;
    linear({M, K, N, at(x), at(w), at(b), at(y)});
}

static void call_gelu(int64_t rows, int64_t n, int64_t x_step, uintptr_t x, uintptr_t y) {
    py::gil_scoped_release others_may_run;
    gelu(rows, n, x_step, reinterpret_cast<float*>(x), reinterpret_cast<float*>(y));
}

static void call_modulate(std::array<int64_t, 4> sizes, uintptr_t x, uintptr_t shift, uintptr_t scale, uintptr_t y) {
    auto [B, S, n, step] = sizes;
    auto at = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
    py::gil_scoped_release others_may_run;
    modulate(B, S, n, step, at(x), at(shift), at(scale), at(y));
}

PYBIND11_MODULE(_cpu, module) {
    module.def("attention_float32", call<float, attention<float>>);
    module.def("attention_bfloat16", call<bfloat16, attention<bfloat16>>);
    module.def("norm_rope_float32", call<float, norm_rope<float>>);
    module.def("norm_rope_bfloat16", call<bfloat16, norm_rope<bfloat16>>);
    module.def("attention_reference", call<float, attention_reference>);
    module.def("linear_float32", call_linear);
    module.def("gelu_float32", call_gelu);
    module.def("modulate_float32", call_modulate);
    module.def("instructions", instructions);
}
