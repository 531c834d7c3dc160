// The CUDA kernels on the CPU, by emulate.h: functions for ctypes.
//
// With -DONLY_TYPE=... -DONLY_CHANNELS=... for one type of numbers and one width of heads, which is compiled in a quarter of the time.

#include <utility>

#include "cuda/mma.cuh"
#include "cuda/naive.cuh"
#include "cuda/norm_rope.cuh"
#include "cuda/tiles.cuh"
#include "cuda/wgmma.cuh"

static Index blocks(int64_t n, int64_t of_block, int64_t heads = 1, int64_t pictures = 1) {
    return {unsigned((n + of_block - 1) / of_block), unsigned(heads), unsigned(pictures)};
}

template <typename T, int CHANNELS> void run(const std::string& name, const Problem<T>& p) {
    int parts = name == "mma" || name == "wgmma" ? 1 : 2;
    launch(norm_rope<T>, blocks(p.B * p.S * parts * p.H, 2), 64, p, parts);                  // two warps a block
    if (name == "naive") launch(attention_naive<T, CHANNELS>, blocks(p.B * p.H * p.S, 2), 64, p);
    if (name == "tiles") launch(attention_tiles<T, CHANNELS>, blocks(p.S, WARPS * QUERIES, p.B * p.H), WARPS * LANES, p);
    if constexpr (sizeof(T) == 2)
        if (name == "mma")
            launch(attention_mma<T, CHANNELS * 32>, blocks(p.S, MMA_WARPS * MMA_QUERIES, p.H, p.B), MMA_WARPS * LANES, p);
    if constexpr (sizeof(T) == 2 && CHANNELS > 1)
        if (name == "wgmma")
            launch(attention_wgmma<T, CHANNELS * 32>, blocks(p.S, CONSUMERS * WGMMA_QUERIES, p.H, p.B), WGMMA_THREADS, p,
                   tile_map(p.k, p, WGMMA_KEYS), tile_map(p.v, p, WGMMA_KEYS));
}

template <typename T> Problem<T> stated(const int64_t* n, const uintptr_t* x) {
    return problem<T>({n[0], n[1], n[2], n[3], n[4]}, x[0], {n[5], n[6], n[7], n[8]}, x[1], x[2], x[3], x[4]);
}

static std::string why_not;

// n: sizes and steps of a problem; x: addresses of qkv, text, image, pe and out. Where it cannot end, `error` says why.
template <typename T> bool call(const char* name, const int64_t* n, const uintptr_t* x, bool hasty) {
    auto p = stated<T>(n, x);
    emulated.hasty = hasty;
    emulated.conflicts = 0;
    try {
#ifdef ONLY_CHANNELS
        run<T, ONLY_CHANNELS>(name, p);
#else
        p.D <= 32 ? run<T, 1>(name, p) : p.D <= 64 ? run<T, 2>(name, p) : run<T, 4>(name, p);
#endif
        return true;
    } catch (const std::runtime_error& error) {
        why_not = error.what();
        return false;
    }
}

#define OFFER(name, T) \
    int name(const char* kernel, const int64_t* n, const uintptr_t* x, bool hasty) { return call<T>(kernel, n, x, hasty); } \
    int mma_takes_##name(const int64_t* n, const uintptr_t* x) { return mma_takes(stated<T>(n, x)); }

extern "C" {
#ifdef ONLY_TYPE
OFFER(only, ONLY_TYPE)
#else
OFFER(float32, float)
OFFER(float16, __half)
OFFER(bfloat16_, __nv_bfloat16)
#endif
int64_t conflicts() { return emulated.conflicts; }
const char* error() { return why_not.c_str(); }
}
