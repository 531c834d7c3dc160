// The problem that every kernel here solves, and the names that all of them use:
//
//     out = softmax(R norm(q) (R norm(k))^T / sqrt(D)) v        for each picture and head on its own
//
//     B  pictures       S  tokens, text before image      norm  x / rms(x) * scale over the D channels of a head
//     H  heads          L  how many of them are text      R     turns the channel pair (2i, 2i+1) by the token's position
//     D  channels of a head, an even number
//
// The same mathematics in Python: miniflux/networks/attention.py. Read on in reference.cpp, then in cpu/attention.cpp or, step by step,
// in cuda/: norm_rope.cuh, naive.cuh, tiles.cuh, mma.cuh, wgmma.cuh.

#pragma once

#include <array>
#include <cstdint>

#ifdef __CUDACC__
#define EVERYWHERE __host__ __device__
#else
#define EVERYWHERE
#endif

// A tensor (B, H, S, D) somewhere in memory: channels are neighbours, the other steps are given in elements.
template <typename T> struct Rows {
    T* data;
    int64_t batch, head, token;

    EVERYWHERE T* operator()(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * token; }
};

template <typename T> struct Problem {
    int64_t B, H, S, L, D;
    Rows<T> q, k, v, out;
    const T *text, *image;        // (2, D): scales of q and k in text rows and in image rows
    const float* pe;              // (S, D/2, 2, 2): [[cos, -sin], [sin, cos]] of each token and pair

    EVERYWHERE const T* scale_q(int64_t s) const { return s < L ? text : image; }
    EVERYWHERE const T* scale_k(int64_t s) const { return scale_q(s) + D; }
    EVERYWHERE const float* turns(int64_t s) const { return pe + s * 2 * D; }
};

using Sizes = std::array<int64_t, 5>;  // B, H, S, L, D
using Steps = std::array<int64_t, 4>;  // of qkv (B, S, 3, H, D): batch, token, from q to k to v, head

// The problem as miniflux/networks/native.py states it: addresses of qkv (B, S, 3, H, D), text, image, pe and out (B, S, H, D).
template <typename T>
Problem<T> problem(Sizes sizes, uintptr_t qkv, Steps steps, uintptr_t text, uintptr_t image, uintptr_t pe, uintptr_t out) {
    auto [B, H, S, L, D] = sizes;
    auto [batch, token, part, head] = steps;
    T* q = reinterpret_cast<T*>(qkv);
    return {B, H, S, L, D, {q, batch, head, token}, {q + part, batch, head, token}, {q + 2 * part, batch, head, token},
            {reinterpret_cast<T*>(out), S * H * D, D, H * D}, reinterpret_cast<T*>(text), reinterpret_cast<T*>(image),
            reinterpret_cast<float*>(pe)};
}
