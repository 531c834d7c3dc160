// Step 0: q = R norm(q) and k = R norm(k), in place. One warp for each row; a lane takes every 32nd pair of channels.
//
// PyTorch's operations write and read a float32 copy of q and k for each of norm, product and rotation. Here every row is read once
// and written once, so that the time is that of the memory alone.

#pragma once

#include "warp.cuh"

// R norm(x) * factor for one row, by N lanes side by side: put(n, even, odd) takes the lane's n-th pair, channels 2 (n N + lane % N) and
// the next. x, scale (D), turns (D/2, 2, 2).
template <int N, typename T, typename Put>
__device__ inline void norm_rope_row(const T* x, const T* scale, const float* turns, int D, float factor, Put put) {
    int own = 2 * (threadIdx.x % N);
    float squares = 0;
    for (int d = own; d < D; d += 2 * N) squares += float(x[d]) * float(x[d]) + float(x[d + 1]) * float(x[d + 1]);
    factor *= rsqrtf(warp_sum<N>(squares) / D + 1e-6f);
#pragma unroll                                             // where D is known, so is n
    for (int first = 0; first < D; first += 2 * N) {
        int d = first + own;
        if (d >= D) break;
        float even = factor * float(x[d]) * float(scale[d]), odd = factor * float(x[d + 1]) * float(scale[d + 1]);
        put(first / (2 * N), turns[2 * d] * even + turns[2 * d + 1] * odd, turns[2 * d + 2] * even + turns[2 * d + 3] * odd);
    }
}

// parts: 2 for keys and queries, 1 for keys alone.
template <typename T> __global__ void norm_rope(Problem<T> p, int parts) {
    int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;     // of (B, S, parts, H)
    if (row >= p.B * p.S * parts * p.H) return;
    int64_t h = row % p.H, part = row / p.H % parts, s = row / p.H / parts % p.S, b = row / p.H / parts / p.S;
    T* x = part ? p.q(b, h, s) : p.k(b, h, s);                                  // (D)
    const T* scale = part ? p.scale_q(s) : p.scale_k(s);                        // (D)
    int lane = threadIdx.x % LANES;
    norm_rope_row<LANES>(x, scale, p.turns(s), int(p.D), 1, [=](int n, float even, float odd) {
        x[2 * (n * LANES + lane)] = T(even);
        x[2 * (n * LANES + lane) + 1] = T(odd);
    });
}
