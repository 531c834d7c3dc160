// What an H100 (sm_90a) can besides: copies of whole tiles that no thread takes part in, barriers that count their bytes, and products
// for which four warps, a group, read matrices from shared memory as they lie there. Below, one function for each such instruction.

#pragma once

#include "warp.cuh"

constexpr int GROUP = 4 * LANES;
constexpr int PANEL = 64;                                        // channels side by side in a tile: rows of 128 bytes

#ifdef __CUDACC__
#include <cuda.h>
#define SHARED_TILES(name) extern __shared__ __align__(1024) char name[]
using TileMap = CUtensorMap;                                     // how tiles lie in a tensor; kernels.cu makes it

// A barrier in shared memory: a phase of it is over when so many threads have arrived, and all bytes that were announced.
__device__ inline void start(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }     // to copies

__device__ inline void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void announce(uint64_t* barrier, int bytes) {          // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase is over that has this parity: the first phase has 0. Of a new barrier the phase before, 1, is.
__device__ inline void wait(uint64_t* barrier, int parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Sends a tile: of picture b and head h the tokens from s on, as many as the map says, PANEL channels from d on; zeros past the end.
__device__ inline void fetch_tile(void* tile, const TileMap& map, uint64_t* barrier, int d, int s, int h, int b) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(shared_address(tile)), "l"(&map), "r"(shared_address(barrier)), "r"(d), "r"(s), "r"(h), "r"(b) : "memory");
}

// What threads have written themselves into shared memory is seen by products after this, and after a barrier.
__device__ inline void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void sync_group(int group) { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP) : "memory"); }

// The registers of c (64, N), N / 2 for each thread, as operands of an instruction.
#define FOUR(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define COLUMNS_64(c) FOUR(c, 0), FOUR(c, 1), FOUR(c, 2), FOUR(c, 3), FOUR(c, 4), FOUR(c, 5), FOUR(c, 6), FOUR(c, 7)
#define COLUMNS_128(c) COLUMNS_64(c), FOUR(c, 8), FOUR(c, 9), FOUR(c, 10), FOUR(c, 11), FOUR(c, 12), FOUR(c, 13), FOUR(c, 14), FOUR(c, 15)
#define NAMES_64 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
    "%25, %26, %27, %28, %29, %30, %31"
#define NAMES_128 NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(N, type, rest) "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" NAMES_##N "}, " rest ";\n}"

// A group's products are in order between these; c is not to be touched, nor what is read to be overwritten, until the end.
template <int N> __device__ inline void begin_products(float (&c)[N][4]) {
    if constexpr (N == 8) asm volatile("wgmma.fence.sync.aligned;" : COLUMNS_64(c)::"memory");
    else asm volatile("wgmma.fence.sync.aligned;" : COLUMNS_128(c)::"memory");
}

template <int N> __device__ inline void end_products(float (&c)[N][4]) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if constexpr (N == 8) asm volatile("wgmma.wait_group.sync.aligned 0;" : COLUMNS_64(c)::"memory");
    else asm volatile("wgmma.wait_group.sync.aligned 0;" : COLUMNS_128(c)::"memory");
}

// c (64, 128) += a (64, 16) b (128, 16)^T, both in shared memory. Of c warp w of the group holds the rows from 16 w on, as mma.cuh says.
template <typename T> __device__ inline void multiply_group(float (&c)[16][4], uint64_t a, uint64_t b) {
    if constexpr (is_half<T>) asm volatile(WGMMA(128, "f16", "%64, %65, add, 1, 1, 0, 0") : COLUMNS_128(c) : "l"(a), "l"(b));
    else asm volatile(WGMMA(128, "bf16", "%64, %65, add, 1, 1, 0, 0") : COLUMNS_128(c) : "l"(a), "l"(b));
}

// c (64, 8 N) += a (64, 16) b (16, 8 N): a in registers, as in mma.cuh, b in shared memory.
template <typename T, int N> __device__ inline void multiply_group(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
    if constexpr (N == 8 && is_half<T>)
        asm volatile(WGMMA(64, "f16", "{%32, %33, %34, %35}, %36, add, 1, 1, 1") : COLUMNS_64(c) : OPERANDS);
    else if constexpr (N == 8)
        asm volatile(WGMMA(64, "bf16", "{%32, %33, %34, %35}, %36, add, 1, 1, 1") : COLUMNS_64(c) : OPERANDS);
    else if constexpr (is_half<T>)
        asm volatile(WGMMA(128, "f16", "{%64, %65, %66, %67}, %68, add, 1, 1, 1") : COLUMNS_128(c) : OPERANDS);
    else
        asm volatile(WGMMA(128, "bf16", "{%64, %65, %66, %67}, %68, add, 1, 1, 1") : COLUMNS_128(c) : OPERANDS);
#undef OPERANDS
}
#else
#include "emulate_hopper.h"
#endif

// Where a matrix lies: rows of 128 bytes, the 8 pieces of each in the order of `place` (wgmma.cuh), 8 rows after each other 1024 bytes;
// where it is more than PANEL columns wide, the next PANEL come so many bytes later.
__device__ inline uint64_t matrix(const void* x, int next = 16) {
    return shared_address(x) % (1 << 18) / 16 | uint64_t(next / 16) << 16 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 62;
}
