// Step 0: q = R norm(q) and k = R norm(k), in place. One warp for each row; a lane takes every 32nd pair of channels.
//
// PyTorch's operations write and read a float32 copy of q and k for each of norm, product and rotation. Here every row is read once
// and written once, so that the time is that of the memory alone.

#pragma once

#include "warp.cuh"

template <typename T> __global__ void norm_rope(Problem<T> p) {
    int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;     // of (B, S, 2, H)
    if (row >= p.B * p.S * 2 * p.H) return;
    int64_t h = row % p.H, part = row / p.H % 2, s = row / p.H / 2 % p.S, b = row / p.H / 2 / p.S;
    T* x = part ? p.k(b, h, s) : p.q(b, h, s);                                  // (D)
    const T* scale = part ? p.scale_k(s) : p.scale_q(s);                        // (D)
    const float* turns = p.turns(s);                                            // (D/2, 2, 2)
    int lane = threadIdx.x % LANES;

    float squares = 0;
    for (int d = 2 * lane; d < p.D; d += 2 * LANES) squares += float(x[d]) * float(x[d]) + float(x[d + 1]) * float(x[d + 1]);
    float factor = rsqrtf(warp_sum(squares) / p.D + 1e-6f);
    for (int d = 2 * lane; d < p.D; d += 2 * LANES) {
        float even = factor * float(x[d]) * float(scale[d]), odd = factor * float(x[d + 1]) * float(scale[d + 1]);
        x[d] = T(turns[2 * d] * even + turns[2 * d + 1] * odd);
        x[d + 1] = T(turns[2 * d + 2] * even + turns[2 * d + 3] * odd);
    }
}
