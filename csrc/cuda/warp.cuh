// What the kernels use of CUDA besides threads: a warp is 32 threads ("lanes") that run side by side and read each other's registers.
// From step 3 on a warp also does as one what no lane could do alone: below, one function for each such instruction.

#pragma once

#include "../attention.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SHARED(T, name, count) __shared__ __align__(128) T name[count]  // as many as the compiler knows
#define SHARED_FLOATS(name) extern __shared__ float name[]              // as many as the launch says
#else
#include "emulate_warp.h"
#endif

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffff;

// The sum over N lanes side by side, and their largest.
template <int N = LANES> __device__ inline float warp_sum(float x) {
    for (int step = N / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

template <int N = LANES> __device__ inline float warp_max(float x) {
    for (int step = N / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

#ifdef __CUDACC__
template <typename T> constexpr bool is_half = std::is_same_v<T, __half>;  // of the two types of 16 bits

// 2^x. Below -126 it is zero.
__device__ inline float power_of_2(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// Two numbers in one register, `low` in its lower half.
template <typename T> __device__ inline uint32_t pack(float low, float high) {
    uint32_t x;
    if constexpr (is_half<T>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

__device__ inline uint32_t shared_address(const void* x) { return uint32_t(__cvta_generic_to_shared(x)); }

// Sends 8 numbers of 16 bits to a place in shared memory, or zeros if they are not `there`. They have come after wait_for_copies().
template <typename T> __device__ inline void copy_async(T* near, const T* far, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(near)), "l"(far), "r"(there ? 16 : 0) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices (8, 8) of 16-bit numbers in shared memory: lane l says where row l % 8 of matrix l / 8 begins, and gets of each matrix
// the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; or, transposed, of column l / 4.
template <typename T> __device__ inline void load_matrices(uint32_t (&x)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}

template <typename T> __device__ inline void load_transposed(uint32_t (&x)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8): see mma.cuh for which lane holds what.
template <typename T> __device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b, uint32_t below) {
    if constexpr (is_half<T>)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(below));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(below));
}
#endif
