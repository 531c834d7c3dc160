// The module miniflux._cpu. Addresses come as integers and steps in elements from
// miniflux/networks/native.py, which checks the tensors. What can be checked without tensors is
// checked here once more, in nanoseconds.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <stdexcept>

#include "kernels.h"

namespace py = pybind11;

// std::invalid_argument is a ValueError in Python.
static void require(bool fits, const char* expected) {
    if (!fits) throw std::invalid_argument(expected);
}

static void require_sizes(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) require(size >= 0, "sizes and steps must not be negative");
}

template <typename T> static void require_elements(std::initializer_list<uintptr_t> addresses) {
    for (uintptr_t address : addresses)
        require(address && address % alignof(T) == 0,
                "addresses must not be null, and must be multiples of the size of an element");
}

template <typename T, void (*kernel)(const Problem<T>&)>
static void call(Sizes sizes, uintptr_t qkv, Steps steps, uintptr_t text, uintptr_t image,
                 uintptr_t pe, uintptr_t out) {
    auto p = problem<T>(sizes, qkv, steps, text, image, pe, out);
    require_sizes({p.B, p.H, p.S, p.L, p.D, steps[0], steps[1], steps[2], steps[3]});
    require(p.L <= p.S && p.D % 2 == 0, "expected L <= S and an even D");
    if (p.B * p.H * p.S * p.D == 0) return;
    require_elements<T>({qkv, text, image, out});
    require_elements<float>({pe});
    py::gil_scoped_release others_may_run;
    kernel(p);
}

static float* at(uintptr_t address) { return reinterpret_cast<float*>(address); }

static void call_linear(std::array<int64_t, 3> sizes, uintptr_t x, uintptr_t w, uintptr_t b,
                        uintptr_t y) {
    auto [M, K, N] = sizes;
    require_sizes({M, K, N});
    require(N % 16 == 0, "expected a multiple of 16 channels");
    if (M * N == 0) return;
    require_elements<float>({x, w, b, y});
    py::gil_scoped_release others_may_run;
    linear({M, K, N, at(x), at(w), at(b), at(y)});
}

static void call_gelu(int64_t rows, int64_t n, int64_t x_step, uintptr_t x, uintptr_t y) {
    require_sizes({rows, n, x_step});
    if (rows * n == 0) return;
    require_elements<float>({x, y});
    py::gil_scoped_release others_may_run;
    gelu(rows, n, x_step, at(x), at(y));
}

static void call_modulate(std::array<int64_t, 4> sizes, uintptr_t x, uintptr_t shift,
                          uintptr_t scale, uintptr_t y) {
    auto [B, S, n, step] = sizes;
    require_sizes({B, S, n, step});
    if (B * S * n == 0) return;
    require_elements<float>({x, shift, scale, y});
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
