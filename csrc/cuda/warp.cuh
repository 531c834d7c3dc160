// What the kernels use of CUDA besides threads: a warp is 32 threads ("lanes") that run side by side and read each other's registers.

#pragma once

#include "../attention.h"

#ifdef __CUDACC__
#define SHARED(name) extern __shared__ float name[]
#else
#include "emulate.h"
#endif

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffff;

__device__ inline float warp_sum(float x) {
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = LANES / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}
