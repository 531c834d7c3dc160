// Starts the kernels: how many blocks of how many threads, and for how wide a head.

#include <stdexcept>

#include "kernels.h"
#include "naive.cuh"
#include "norm_rope.cuh"
#include "tiles.cuh"

constexpr int THREADS = 256;                           // 8 warps

static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

static unsigned blocks(int64_t warps) { return unsigned((warps * LANES + THREADS - 1) / THREADS); }

// launch(integer): CHANNELS of each lane, as few of 1, 2, 4 and 8 as D needs.
template <typename Launch> static void for_width(int64_t D, Launch launch) {
    if (D <= 32) launch(std::integral_constant<int, 1>());
    else if (D <= 64) launch(std::integral_constant<int, 2>());
    else if (D <= 128) launch(std::integral_constant<int, 4>());
    else if (D <= 256) launch(std::integral_constant<int, 8>());
    else throw std::runtime_error("heads of more than 256 channels have no CUDA kernel");
}

template <typename T> void norm_rope(const Problem<T>& p, void* stream) {
    norm_rope<<<blocks(p.B * p.S * 2 * p.H), THREADS, 0, cudaStream_t(stream)>>>(p);
    check(cudaGetLastError());
}

template <typename T> void naive(const Problem<T>& p, void* stream) {
    norm_rope(p, stream);
    for_width(p.D, [&](auto channels) {
        attention_naive<T, channels><<<blocks(p.B * p.H * p.S), THREADS, 0, cudaStream_t(stream)>>>(p);
    });
    check(cudaGetLastError());
}

template <typename T> void tiles(const Problem<T>& p, void* stream) {
    norm_rope(p, stream);
    dim3 grid(unsigned((p.S + WARPS * QUERIES - 1) / (WARPS * QUERIES)), unsigned(p.B * p.H));
    int bytes = int(tile_floats(p.D) * sizeof(float));
    for_width(p.D, [&](auto channels) {
        auto kernel = attention_tiles<T, channels>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        kernel<<<grid, WARPS * LANES, bytes, cudaStream_t(stream)>>>(p);
    });
    check(cudaGetLastError());
}

#define OFFER(T) \
    template void norm_rope(const Problem<T>&, void*); \
    template void naive(const Problem<T>&, void*); \
    template void tiles(const Problem<T>&, void*);
OFFER(float)
OFFER(__half)
OFFER(__nv_bfloat16)
