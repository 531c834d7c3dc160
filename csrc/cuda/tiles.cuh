// Step 2: keys and values in shared memory, where all queries of a block find them.
//
// In step 1 each query reads all keys and values from far memory. Here a block of 4 warps fetches 32 of them at a time, once for its
// 32 queries. Scores: a lane is a key. Products with the values: a lane is every 32nd channel again.

#pragma once

#include "warp.cuh"

constexpr int KEYS = LANES;                            // of a tile: one for each lane
constexpr int WARPS = 4, QUERIES = 8;                  // warps of a block, queries of a warp

// Floats of shared memory: tiles of queries (32, D), keys (32, D + 1), values (32, D).
constexpr int64_t tile_floats(int64_t D) { return WARPS * QUERIES * D + KEYS * (D + 1) + KEYS * D; }

// q and k are normalised and turned. CHANNELS: of each lane, at least D / 32.
template <typename T, int CHANNELS> __global__ void attention_tiles(Problem<T> p) {
    SHARED_FLOATS(memory);
    float *queries = memory, *keys = queries + WARPS * QUERIES * p.D, *values = keys + KEYS * (p.D + 1);
    int64_t h = blockIdx.y % p.H, b = blockIdx.y / p.H, first = int64_t(blockIdx.x) * WARPS * QUERIES;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, D = p.D;
    float sums[QUERIES][CHANNELS] = {}, largest[QUERIES], total[QUERIES] = {};
    for (int n = 0; n < QUERIES; n++) largest[n] = -INFINITY;

    for (int i = threadIdx.x; i < WARPS * QUERIES * D; i += WARPS * LANES) {
        int64_t s = first + i / D;
        queries[i] = s < p.S ? float(p.q(b, h, s)[i % D]) * rsqrtf(float(D)) : 0;
    }
    for (int64_t t = 0; t < p.S; t += KEYS) {
        __syncthreads();                               // nobody reads the tile before any more
        for (int i = threadIdx.x; i < KEYS * D; i += WARPS * LANES) {
            bool there = t + i / D < p.S;
            // A row of keys is one float longer, so that the 32 lanes read from 32 banks.
            keys[i / D * (D + 1) + i % D] = there ? float(p.k(b, h, t + i / D)[i % D]) : 0;
            values[i] = there ? float(p.v(b, h, t + i / D)[i % D]) : 0;
        }
        __syncthreads();                               // all of the tile is there
#pragma unroll                                             // or `sums` could not be registers
        for (int n = 0; n < QUERIES; n++) {
            const float* query = queries + (warp * QUERIES + n) * D;
            float score = 0;
            for (int d = 0; d < D; d++) score += query[d] * keys[lane * (D + 1) + d];
            if (t + lane >= p.S) score = -INFINITY;    // the last tile may be shorter
            float before = largest[n];
            largest[n] = fmaxf(before, warp_max(score));
            float shrink = expf(before - largest[n]), weight = expf(score - largest[n]);
            total[n] = total[n] * shrink + warp_sum(weight);
            for (int i = 0; i < CHANNELS; i++) sums[n][i] *= shrink;
            for (int j = 0; j < KEYS; j++) {
                float of_key = __shfl_sync(ALL, weight, j);
                for (int i = 0; i < CHANNELS; i++)
                    if (lane + i * LANES < D) sums[n][i] += of_key * values[j * D + lane + i * LANES];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < QUERIES; n++) {
        int64_t s = first + warp * QUERIES + n;
        for (int i = 0; i < CHANNELS; i++)
            if (s < p.S && lane + i * LANES < D) p.out(b, h, s)[lane + i * LANES] = T(sums[n][i] / total[n]);
    }
}
