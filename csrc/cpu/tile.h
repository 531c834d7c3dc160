// What the loops here share: a tile of a matrix product that stays in the registers while it is
// summed up, and e^x.
//
// There are no intrinsics: the compiler vectorises the loops, once for each generation of x86 CPUs,
// and the right version is chosen when the module is loaded (EVERY_CPU).

#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// AVX-512, AVX2, SSE2
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
static inline bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
static inline bool has_avx2() { return __builtin_cpu_supports("avx2"); }
#else
#define EVERY_CPU
static inline bool has_avx512() { return false; }
static inline bool has_avx2() { return false; }
#endif

constexpr int64_t BLOCK = 16;

// c (ROWS, 16) = a (ROWS, n) b (n, 16) + start (16).
// Eight rows of sums fill the registers of AVX-512, four those of AVX2.
template <int64_t ROWS>
EVERY_CPU static void tile(const float* a, int64_t a_step, const float* b, int64_t b_step,
                           int64_t n, const float* start, float* c, int64_t c_step) {
    float sum[ROWS][BLOCK];
    for (int64_t r = 0; r < ROWS; r++) std::copy(start, start + BLOCK, sum[r]);
    for (int64_t i = 0; i < n; i++) {
        __builtin_prefetch(b + i * b_step + BLOCK);                   // the columns that come next
        for (int64_t r = 0; r < ROWS; r++)
#pragma omp simd  // Note: without it the compiler vectorises another loop, and is six times slower
            for (int64_t j = 0; j < BLOCK; j++)
                sum[r][j] += a[r * a_step + i] * b[i * b_step + j];
    }
    for (int64_t r = 0; r < ROWS; r++) std::copy(sum[r], sum[r] + BLOCK, c + r * c_step);
}

// e^x for x <= 0, as 2^n e^r with |r| <= log(2)/2 and a polynomial for e^r.
// Below -87 it stays at 1e-38.
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;                            // Note: written so that a NaN passes
    int32_t n = int32_t(x * 1.44269504f - 0.5f);
    // Note: log(2) in two parts, so that the first product is exact.
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float e = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f
                + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return e * from_bits(uint32_t(n + 127) << 23);
}
