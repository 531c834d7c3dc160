// Step 4: the same with what an H100 has for it. One instruction of a group of four warps multiplies a matrix (64, 16) by one (16, 128).
//
// Step 3 spreads every matrix over registers before it multiplies. Here keys and values stay in shared memory, where the product reads
// them itself, and so do queries; only weights come from registers, where step 3 leaves them, too. A block has three groups:
//
//     two consumers   each 64 queries: scores = q k^T, the weights of softmax, sums += weights v
//     one producer    a single thread of it sends keys, values, keys, values, ... tile after tile into a ring of buffers
//
// For each buffer there are two barriers: `full` when its tile is there, and `empty` when all consumer warps are done with it. While one
// group computes its weights, the other multiplies. In registers a and c lie as in step 3, of each warp's own 16 rows.

#pragma once

#include "hopper.cuh"
#include "norm_rope.cuh"

constexpr int CONSUMERS = 2, WGMMA_QUERIES = 64, WGMMA_KEYS = 128, BUFFERS = 4;      // groups; of a group, of a tile; of the ring
constexpr int WGMMA_THREADS = (CONSUMERS + 1) * GROUP;

constexpr int wgmma_bytes(int D) {                               // of shared memory: queries, the ring, its barriers
    return (CONSUMERS * WGMMA_QUERIES + BUFFERS * WGMMA_KEYS) * D * 2 + 2 * BUFFERS * 8;
}

// Where channel d of a row lies in a tile (rows, D): panels of PANEL channels, in whose rows of 8 pieces of 16 bytes the number of the
// piece is changed by the row's (XOR), so that a product, which reads 8 rows at a time, finds them in different banks. Copies do it by
// themselves.
__device__ inline int place(int rows, int row, int d) {
    return d / PANEL * rows * PANEL + row * PANEL + (d % PANEL / 8 ^ row % 8) * 8 + d % 8;
}

// k is normalised and turned, q is not. keys, values: how tiles of WGMMA_KEYS tokens lie in k and v.
// Of the 65536 registers each thread gets 168. That is enough, so the producer does not give its own away (setmaxnreg).
template <typename T, int D> __global__ void __launch_bounds__(WGMMA_THREADS)
attention_wgmma(Problem<T> p, const __grid_constant__ TileMap keys, const __grid_constant__ TileMap values) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)   // for others the kernel is empty
    SHARED_TILES(shared);
    constexpr int QUERIES = WGMMA_QUERIES, KEYS = WGMMA_KEYS;
    T* queries = reinterpret_cast<T*>(shared);                   // (CONSUMERS, QUERIES, D)
    T* ring = queries + CONSUMERS * QUERIES * D;                 // (BUFFERS, KEYS, D)
    uint64_t* full = reinterpret_cast<uint64_t*>(ring + BUFFERS * KEYS * D);
    uint64_t* empty = full + BUFFERS;
    int h = blockIdx.y, b = blockIdx.z, S = p.S, group = threadIdx.x / GROUP, lane = threadIdx.x % LANES;

    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) start(full + i, 1), start(empty + i, CONSUMERS * GROUP / LANES);
        show_barriers();
    }
    __syncthreads();

    if (group == CONSUMERS) {
        if (threadIdx.x % GROUP == 0)
            for (int i = 0; i / 2 * KEYS < S; i++) {             // keys, values, keys, values, ...
                int buffer = i % BUFFERS;
                wait(empty + buffer, i / BUFFERS % 2 ^ 1);       // at first each is
                announce(full + buffer, KEYS * D * sizeof(T));
                for (int d = 0; d < D; d += PANEL)
                    fetch_tile(ring + (buffer * D + d) * KEYS, i % 2 ? values : keys, full + buffer, d, i / 2 * KEYS, h, b);
            }
        return;
    }

    T* query = queries + group * QUERIES * D;
    int own = threadIdx.x % GROUP / LANES * 16, first = (blockIdx.x * CONSUMERS + group) * QUERIES + own;        // rows of the warp
#pragma unroll 4                                                 // so that four rows are on their way at once
    for (int row = 0; row < 16; row++) {
        int s = first + row < S ? first + row : S - 1;
        float factor = 1.44269504f * rsqrtf(float(D));           // for 2^x instead of e^x
        norm_rope_row<LANES>(p.q(b, h, s), p.scale_q(s), p.turns(s), D, factor, [&](int n, float even, float odd) {
            *reinterpret_cast<uint32_t*>(query + place(QUERIES, own + row, 2 * (n * LANES + lane))) = pack<T>(even, odd);
        });
    }
    show_to_products();
    sync_group(group);

    float sums[D / 8][4] = {};                                   // c of (64, D)
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};    // of the lane's rows: lane / 4 + 8 r

    for (int t = 0; t < S; t += KEYS) {
        int i = t / KEYS * 2, buffer = i % BUFFERS, phase = i / BUFFERS % 2;
        T* tile = ring + buffer * KEYS * D;                      // of keys; that of values is the next
        wait(full + buffer, phase);
        float scores[KEYS / 8][4] = {};                          // c of (64, KEYS)
        begin_products(scores);
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            int at = d / PANEL * PANEL, piece = d % PANEL;       // Note: a step within a row leaves the order of its pieces to the product
            multiply_group<T>(scores, matrix(query + at * QUERIES + piece), matrix(tile + at * KEYS + piece));
        }
        end_products(scores);
        if (lane == 0) arrive(empty + buffer);

        if (t + KEYS > S)                                        // the last tile may be shorter
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = 0; i < 4; i++)
                    if (t + 8 * j + lane % 4 * 2 + i % 2 >= S) scores[j][i] = -INFINITY;

        for (int r = 0; r < 2; r++) {
            float before = largest[r];
            for (int j = 0; j < KEYS / 8; j++) largest[r] = fmaxf(largest[r], fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
            largest[r] = warp_max<4>(largest[r]);
            float shrink = power_of_2(before - largest[r]);
            total[r] *= shrink;
            for (int n = 0; n < D / 8; n++) sums[n][2 * r] *= shrink, sums[n][2 * r + 1] *= shrink;
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = 2 * r; i < 2 * r + 2; i++) total[r] += scores[j][i] = power_of_2(scores[j][i] - largest[r]);
        }

        uint32_t weights[KEYS / 16][4];                          // a of 16 keys each
        for (int j = 0; j < KEYS / 16; j++)
            for (int i = 0; i < 4; i++) weights[j][i] = pack<T>(scores[2 * j + i / 2][i % 2 * 2], scores[2 * j + i / 2][i % 2 * 2 + 1]);
        wait(full + buffer + 1, phase);
        begin_products(sums);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++)
            multiply_group<T>(sums, weights[j], matrix(tile + (D * KEYS + 16 * j * PANEL), KEYS * PANEL * sizeof(T)));
        end_products(sums);
        if (lane == 0) arrive(empty + buffer + 1);
    }

    for (int r = 0; r < 2; r++) {
        float factor = 1 / warp_sum<4>(total[r]);
        int s = first + lane / 4 + 8 * r;
        for (int n = 0; s < S && n < D / 8; n++) {
            const float* sum = &sums[n][2 * r];                  // of two channels
            *reinterpret_cast<uint32_t*>(p.out(b, h, s) + 8 * n + lane % 4 * 2) = pack<T>(factor * sum[0], factor * sum[1]);
        }
    }
#endif
}
