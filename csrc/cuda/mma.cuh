// Step 3: tensor cores. One instruction of a warp multiplies a matrix (16, 16) by one (16, 8), for which step 2 needs 64 of each lane.
//
// Its three matrices are spread over the registers of the warp: lane l holds, with i = l / 4 and j = 2 (l % 4),
//
//     a (16, 16)  rows i, i + 8  columns j, j + 1, j + 8, j + 9      two numbers to a register: 4 of them
//     b (16, 8)   rows j, j + 1, j + 8, j + 9  column i              2
//     c (16, 8)   rows i, i + 8  columns j, j + 1                    4, in float32
//
// Queries are a, keys and values b; load_matrices spreads them, from tiles in shared memory. Two c of scores, side by side, become an a
// of weights without leaving their lane. While keys are multiplied their values are on the way, and during these the next keys.

#pragma once

#include "norm_rope.cuh"

constexpr int MMA_WARPS = 4, MMA_QUERIES = 32;                   // of a block; of a warp: two a, so that each b is loaded for both
template <int D> constexpr int mma_keys = D > 64 ? 32 : 64;      // of a tile: as many as the registers have room for scores

// Whether the kernel takes it: numbers of 16 bits, heads of 32, 64 or 128 channels, rows that begin at multiples of 16 bytes.
template <typename T> bool mma_takes(const Problem<T>& p) {
    auto aligned = [](const Rows<T>& x) { return (int64_t(x.data) / 2 | x.batch | x.head | x.token) % 8 == 0; };
    return sizeof(T) == 2 && (p.D == 32 || p.D == 64 || p.D == 128) && aligned(p.k) && aligned(p.v) && aligned(p.out);
}

// Where the 8 channels `chunk` of a row lie in a tile (rows, D). The memory has 8 banks of 16 bytes, and is read fastest when 8 rows at
// a time come from all of them: so the number of the chunk is changed by bits of the row's (XOR).
template <int D> __device__ inline int place(int row, int chunk) {
    constexpr int CHUNKS = D / 8, BANKS = CHUNKS < 8 ? CHUNKS : 8;               // of a row
    return row * D + (chunk ^ row * BANKS / 8 % BANKS) * 8;
}

// k is normalised and turned, q is not.
template <typename T, int D> __global__ void __launch_bounds__(MMA_WARPS* LANES) attention_mma(Problem<T> p) {
    constexpr int KEYS = mma_keys<D>;
    SHARED(T, queries, MMA_WARPS * MMA_QUERIES * D);
    SHARED(T, keys, KEYS * D);
    SHARED(T, values, KEYS * D);
    int h = blockIdx.y, b = blockIdx.z, S = p.S, lane = threadIdx.x % LANES, own = threadIdx.x / LANES * MMA_QUERIES;
    int first = blockIdx.x * MMA_WARPS * MMA_QUERIES + own;      // of the warp's queries, which are `own` and on in the tile

    auto fetch = [&](const Rows<T>& x, int t, T* tile) {         // a thread takes 8 channels of every so many rows; zeros past the end
        int chunk = threadIdx.x % (D / 8);
        for (int row = threadIdx.x / (D / 8); row < KEYS; row += MMA_WARPS * LANES / (D / 8))
            copy_async(tile + place<D>(row, chunk), x(b, h, t + row) + 8 * chunk, t + row < S);
    };
    fetch(p.k, 0, keys);

    for (int row = 0; row < MMA_QUERIES; row++) {
        int s = first + row < S ? first + row : S - 1;
        float factor = 1.44269504f * rsqrtf(float(D));           // for 2^x instead of e^x
        norm_rope_row<LANES>(p.q(b, h, s), p.scale_q(s), p.turns(s), D, factor, [&](int n, float even, float odd) {
            int d = 2 * (n * LANES + lane);
            *reinterpret_cast<uint32_t*>(queries + place<D>(own + row, d / 8) + d % 8) = pack<T>(even, odd);
        });
    }

    float sums[2][D / 8][4] = {};                                // c of (32, D)
    float largest[4], total[4] = {};                             // of the lane's rows: lane / 4 + 8 r
    for (int r = 0; r < 4; r++) largest[r] = -INFINITY;
    int at = place<D>(lane % 16, lane / 16);                     // the lane's row of four matrices (8, 8): of two by two that are one (16, 16)

    for (int t = 0; t < S; t += KEYS) {
        wait_for_copies();
        __syncthreads();                                         // the keys are there, and nobody reads the values before them any more
        fetch(p.v, t, values);

        float scores[2][KEYS / 8][4] = {};                   // c of (32, KEYS)
        for (int c = 0; c < D / 16; c++) {
            uint32_t query[2][4];                                // a of 16 channels
            for (int m = 0; m < 2; m++) load_matrices(query[m], queries + (at ^ 16 * c) + (own + 16 * m) * D);
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t k[4];                                   // two b of them: 8 keys, and the next 8
                load_matrices(k, keys + (at ^ 16 * c) + 16 * j * D);
                for (int m = 0; m < 2; m++) {
                    multiply<T>(scores[m][2 * j], query[m], k[0], k[2]);
                    multiply<T>(scores[m][2 * j + 1], query[m], k[1], k[3]);
                }
            }
        }
        wait_for_copies();
        __syncthreads();                                         // the values are there, and nobody reads the keys any more
        if (t + KEYS < S) fetch(p.k, t + KEYS, keys);

        if (t + KEYS > S)                                    // the last tile may be shorter
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = 0; i < 4; i++)
                    if (t + 8 * j + lane % 4 * 2 + i % 2 >= S) scores[0][j][i] = scores[1][j][i] = -INFINITY;

        for (int r = 0; r < 4; r++) {
            float before = largest[r];
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = r % 2 * 2; i < r % 2 * 2 + 2; i++) largest[r] = fmaxf(largest[r], scores[r / 2][j][i]);
            largest[r] = warp_max<4>(largest[r]);
            float shrink = power_of_2(before - largest[r]);
            total[r] *= shrink;
            if (__any_sync(ALL, shrink != 1))                    // soon no tile has a larger score
                for (int n = 0; n < D / 8; n++)
                    for (int i = r % 2 * 2; i < r % 2 * 2 + 2; i++) sums[r / 2][n][i] *= shrink;
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = r % 2 * 2; i < r % 2 * 2 + 2; i++)
                    total[r] += scores[r / 2][j][i] = power_of_2(scores[r / 2][j][i] - largest[r]);
        }

        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t weights[2][4];                              // a of 16 keys
            for (int m = 0; m < 2; m++)
                for (int i = 0; i < 4; i++)
                    weights[m][i] = pack<T>(scores[m][2 * j + i / 2][i % 2 * 2], scores[m][2 * j + i / 2][i % 2 * 2 + 1]);
            for (int c = 0; c < D / 16; c++) {
                uint32_t v[4];                                   // two b of them: 8 channels, and the next 8
                load_transposed(v, values + (at ^ 16 * c) + 16 * j * D);
                for (int m = 0; m < 2; m++) {
                    multiply<T>(sums[m][2 * c], weights[m], v[0], v[1]);
                    multiply<T>(sums[m][2 * c + 1], weights[m], v[2], v[3]);
                }
            }
        }
    }

    for (int r = 0; r < 4; r++) {
        float factor = 1 / warp_sum<4>(total[r]);
        int s = first + lane / 4 + 8 * r;
        for (int n = 0; s < S && n < D / 8; n++) {
            const float* sum = &sums[r / 2][n][r % 2 * 2];       // of two channels
            *reinterpret_cast<uint32_t*>(p.out(b, h, s) + 8 * n + lane % 4 * 2) = pack<T>(factor * sum[0], factor * sum[1]);
        }
    }
}
