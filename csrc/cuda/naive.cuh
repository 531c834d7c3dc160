// Step 1: one warp for each query, all keys one after the other, everything in registers.
//
// The softmax needs the largest score before the first exponential. It is found on the way: whenever a larger score comes, what has
// been summed so far shrinks by exp(old largest - new largest). So no row of scores is ever stored.

#pragma once

#include "warp.cuh"

// q and k are normalised and turned. CHANNELS: of each lane, at least D / 32.
template <typename T, int CHANNELS> __global__ void attention_naive(Problem<T> p) {
    int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;     // of (B, H, S)
    if (row >= p.B * p.H * p.S) return;
    int64_t s = row % p.S, h = row / p.S % p.H, b = row / p.S / p.H;
    int lane = threadIdx.x % LANES;
    const T* q = p.q(b, h, s);                                                  // (D)
    float query[CHANNELS], sums[CHANNELS] = {}, largest = -INFINITY, total = 0;
    for (int i = 0; i < CHANNELS; i++) {
        int d = lane + i * LANES;
        query[i] = d < p.D ? float(q[d]) * rsqrtf(float(p.D)) : 0;
    }
    for (int64_t t = 0; t < p.S; t++) {
        const T *k = p.k(b, h, t), *v = p.v(b, h, t);                           // (D)
        float dot = 0;
        for (int i = 0; i < CHANNELS; i++)
            if (lane + i * LANES < p.D) dot += query[i] * float(k[lane + i * LANES]);
        float score = warp_sum(dot), before = largest;
        largest = fmaxf(largest, score);
        float shrink = expf(before - largest), weight = expf(score - largest);
        total = total * shrink + weight;
        for (int i = 0; i < CHANNELS; i++)
            if (lane + i * LANES < p.D) sums[i] = sums[i] * shrink + weight * float(v[lane + i * LANES]);
    }
    for (int i = 0; i < CHANNELS; i++)
        if (lane + i * LANES < p.D) p.out(b, h, s)[lane + i * LANES] = T(sums[i] / total);
}
