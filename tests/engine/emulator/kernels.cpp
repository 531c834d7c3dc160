// The CUDA kernels on the CPU, by csrc/cuda/emulate.h: functions for ctypes that return 0, or 1 where threads wait for ever.

#include <stdexcept>
#include <tuple>

#include "cpu/bfloat16.h"
#include "cuda/naive.cuh"
#include "cuda/norm_rope.cuh"
#include "cuda/tiles.cuh"

template <typename T> Problem<T> problem(const int64_t* n, T* qkv, T* text, T* image, float* pe, T* out) {
    auto [B, H, S, L, D] = std::tuple(n[0], n[1], n[2], n[3], n[4]);
    auto rows = [&](T* data) { return Rows<T>{data, S * 3 * H * D, D, 3 * H * D}; };        // of (B, S, 3, H, D)
    return {B, H, S, L, D, rows(qkv), rows(qkv + H * D), rows(qkv + 2 * H * D), {out, S * H * D, D, H * D}, text, image, pe};
}

template <typename T, int CHANNELS> void run(const char* name, const Problem<T>& p) {
    auto warps = [](int64_t n) { return Index{unsigned((n + 1) / 2), 1, 1}; };               // two warps a block
    launch(norm_rope<T>, warps(p.B * p.S * 2 * p.H), 64, 0, p);
    if (name[0] == 'n' && name[1] == 'a') launch(attention_naive<T, CHANNELS>, warps(p.B * p.H * p.S), 64, 0, p);
    if (name[0] == 't')
        launch(attention_tiles<T, CHANNELS>, Index{unsigned((p.S + WARPS * QUERIES - 1) / (WARPS * QUERIES)), unsigned(p.B * p.H), 1},
               WARPS * LANES, tile_floats(p.D), p);
}

template <typename T> int call(const char* name, const int64_t* n, T* qkv, T* text, T* image, float* pe, T* out) {
    try {
        auto p = problem(n, qkv, text, image, pe, out);
        p.D <= 32 ? run<T, 1>(name, p) : p.D <= 64 ? run<T, 2>(name, p) : run<T, 4>(name, p);
        return 0;
    } catch (const std::runtime_error&) {
        return 1;
    }
}

extern "C" int float32(const char* name, const int64_t* n, float* qkv, float* text, float* image, float* pe, float* out) {
    return call(name, n, qkv, text, image, pe, out);
}

extern "C" int bfloat(const char* name, const int64_t* n, bfloat16* qkv, bfloat16* text, bfloat16* image, float* pe, bfloat16* out) {
    return call(name, n, qkv, text, image, pe, out);
}
