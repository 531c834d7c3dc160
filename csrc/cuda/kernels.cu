// Starts the kernels: how many blocks of how many threads, and for how wide a head.

#include <cudaTypedefs.h>

#include <stdexcept>

#include "kernels.h"
#include "mma.cuh"
#include "naive.cuh"
#include "norm_rope.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

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

// How tiles of WGMMA_KEYS tokens and PANEL channels lie in a tensor. The driver is asked by name, so that nothing has to be linked to it.
template <typename T> static TileMap tile_map(const Rows<T>& x, const Problem<T>& p) {
    static const auto encode = [] {                        // once
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
        if (!function) throw std::runtime_error("wgmma needs a driver for CUDA 12 or newer");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    cuuint64_t sizes[4] = {cuuint64_t(p.D), cuuint64_t(p.S), cuuint64_t(p.H), cuuint64_t(p.B)};
    cuuint64_t steps[3] = {cuuint64_t(x.token * 2), cuuint64_t(x.head * 2), cuuint64_t(x.batch * 2)};           // in bytes
    cuuint32_t tile[4] = {PANEL, WGMMA_KEYS, 1, 1}, every[4] = {1, 1, 1, 1};
    auto type = is_half<T> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    TileMap map;
    auto result = encode(
        &map, type, 4, x.data, sizes, steps, tile, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::runtime_error("the driver cannot copy tiles of this tensor: error " + std::to_string(result));
    return map;
}

template <typename T> void wgmma(const Problem<T>& p, void* stream) {
    int device, major, minor;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major != 9 || minor != 0)
        throw std::runtime_error("wgmma needs an H100 or its like, of compute capability 9.0; this GPU has " + std::to_string(major) + "." +
                                 std::to_string(minor));
    if (!mma_takes(p) || p.D < PANEL)
        throw std::runtime_error("wgmma takes float16 and bfloat16, heads of 64 or 128 channels, and rows at multiples of 16 bytes");
    if constexpr (sizeof(T) == 2) {
        norm_rope_of(1, p, stream);
        auto kernel = p.D == 64 ? attention_wgmma<T, 64> : attention_wgmma<T, 128>;
        dim3 grid(blocks(p.S, CONSUMERS * WGMMA_QUERIES), unsigned(p.H), unsigned(p.B));
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wgmma_bytes(int(p.D))));
        kernel<<<grid, WGMMA_THREADS, wgmma_bytes(int(p.D)), cudaStream_t(stream)>>>(p, tile_map(p.k, p), tile_map(p.v, p));
        check(cudaGetLastError());
    }
}

// Note: wgmma has not been measured yet: it runs where it is asked for by name.
template <typename T> void attention(const Problem<T>& p, void* stream) { mma_takes(p) ? mma(p, stream) : tiles(p, stream); }

#define OFFER(T) \
    template void norm_rope(const Problem<T>&, void*); \
    template void naive(const Problem<T>&, void*); \
    template void tiles(const Problem<T>&, void*); \
    template void mma(const Problem<T>&, void*); \
    template void wgmma(const Problem<T>&, void*); \
    template void attention(const Problem<T>&, void*);
OFFER(float)
OFFER(__half)
OFFER(__nv_bfloat16)
