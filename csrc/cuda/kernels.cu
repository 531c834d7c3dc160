// Starts the kernels: how many blocks of how many threads, and for how wide a head.

#include <stdexcept>

#include "kernels.h"
#include "mma.cuh"
#include "naive.cuh"
#include "norm_rope.cuh"
#include "tiles.cuh"

constexpr int THREADS = 256;                           // 8 warps

static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

static unsigned blocks(int64_t n, int64_t of_block) { return unsigned((n + of_block - 1) / of_block); }

// launch(integer): CHANNELS of each lane, as few of 1, 2, 4 and 8 as D needs.
template <typename Launch> static void for_width(int64_t D, Launch launch) {
    if (D <= 32) launch(std::integral_constant<int, 1>());
    else if (D <= 64) launch(std::integral_constant<int, 2>());
    else if (D <= 128) launch(std::integral_constant<int, 4>());
    else if (D <= 256) launch(std::integral_constant<int, 8>());
    else throw std::runtime_error("heads of more than 256 channels have no CUDA kernel");
}

template <typename T> static void norm_rope_of(int parts, const Problem<T>& p, void* stream) {
    norm_rope<<<blocks(p.B * p.S * parts * p.H * LANES, THREADS), THREADS, 0, cudaStream_t(stream)>>>(p, parts);
    check(cudaGetLastError());
}

template <typename T> void norm_rope(const Problem<T>& p, void* stream) { norm_rope_of(2, p, stream); }

template <typename T> void naive(const Problem<T>& p, void* stream) {
    norm_rope_of(2, p, stream);
    for_width(p.D, [&](auto channels) {
        attention_naive<T, channels><<<blocks(p.B * p.H * p.S * LANES, THREADS), THREADS, 0, cudaStream_t(stream)>>>(p);
    });
    check(cudaGetLastError());
}

template <typename T> void tiles(const Problem<T>& p, void* stream) {
    norm_rope_of(2, p, stream);
    dim3 grid(blocks(p.S, WARPS * QUERIES), unsigned(p.B * p.H));
    int bytes = int(tile_floats(p.D) * sizeof(float));
    for_width(p.D, [&](auto channels) {
        auto kernel = attention_tiles<T, channels>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        kernel<<<grid, WARPS * LANES, bytes, cudaStream_t(stream)>>>(p);
    });
    check(cudaGetLastError());
}

template <typename T> void mma(const Problem<T>& p, void* stream) {
    if (!mma_takes(p))
        throw std::runtime_error("mma takes float16 and bfloat16, heads of 32, 64 or 128 channels, and rows at multiples of 16 bytes");
    if constexpr (sizeof(T) == 2) {
        norm_rope_of(1, p, stream);
        auto kernel = p.D == 32 ? attention_mma<T, 32> : p.D == 64 ? attention_mma<T, 64> : attention_mma<T, 128>;
        dim3 grid(blocks(p.S, MMA_WARPS * MMA_QUERIES), unsigned(p.H), unsigned(p.B));
        kernel<<<grid, MMA_WARPS * LANES, 0, cudaStream_t(stream)>>>(p);
        check(cudaGetLastError());
    }
}

template <typename T> void attention(const Problem<T>& p, void* stream) { mma_takes(p) ? mma(p, stream) : tiles(p, stream); }

#define OFFER(T) \
    template void norm_rope(const Problem<T>&, void*); \
    template void naive(const Problem<T>&, void*); \
    template void tiles(const Problem<T>&, void*); \
    template void mma(const Problem<T>&, void*); \
    template void attention(const Problem<T>&, void*);
OFFER(float)
OFFER(__half)
OFFER(__nv_bfloat16)
