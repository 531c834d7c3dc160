// What a warp does as one (warp.cuh) on a CPU, for tests: as PTX's tables of fragments have it, computed by each lane for itself.
//
// Copies arrive when their thread waits for them, or at once, as the test wants it. Rows of a matrix that share a bank are counted.

#pragma once

#include "cpu/bfloat16.h"
#include "emulate.h"

using __half = _Float16;
using __nv_bfloat16 = bfloat16;

#define SHARED(T, name, count) T* name = shared_memory<T>(count)

template <typename T> T* shared_memory(int64_t count) {         // one array after the other, for every thread the same
    char* array = emulated.shared + emulated.fiber().shared;
    emulated.fiber().shared += count * sizeof(T);
    if (emulated.fiber().shared > STATIC_BYTES) throw std::runtime_error("so much shared memory there is not");
    return reinterpret_cast<T*>(array);
}

static void* in_shared(const void* x) {                // 16 bytes that a copy or a matrix may have
    int64_t offset = static_cast<const char*>(x) - emulated.shared;
    if (offset < 0 || offset > SHARED_BYTES - 16 || offset % 16) throw std::runtime_error("this is not a place in shared memory");
    return emulated.shared + offset;
}

static float power_of_2(float x) { return std::exp2(x); }

template <typename T> float number(uint32_t x, int half) {
    return float(reinterpret_cast<const T*>(&x)[half]);
}

template <typename T> uint32_t pack(float low, float high) {
    T numbers[2] = {T(low), T(high)};
    uint32_t x;
    std::memcpy(&x, numbers, sizeof x);
    return x;
}

static void arrive(Copy copy) { copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16); }

template <typename T> void copy_async(T* near, const T* far, bool there) {
    if (uintptr_t(far) % 16) throw std::runtime_error("a copy must begin at a multiple of 16 bytes");
    Copy copy{in_shared(near), there ? far : nullptr};
    if (emulated.hasty) arrive(copy);
    else emulated.fiber().copies.push_back(copy);
}

static void wait_for_copies() {
    for (auto& copy : emulated.fiber().copies) arrive(copy);
    emulated.fiber().copies.clear();
}

using Row = const uint16_t*;                           // of 8 numbers, whatever they stand for

static void load(uint32_t (&x)[4], const void* row, bool transposed) {
    auto rows = meet(static_cast<Row>(in_shared(row)));
    int i = emulated.current % 32 / 4, j = emulated.current % 4 * 2;
    for (int m = 0; m < 4; m++) {
        Row low = transposed ? rows(8 * m + j) + i : rows(8 * m + i) + j, high = transposed ? rows(8 * m + j + 1) + i : low + 1;
        x[m] = uint32_t(*high) << 16 | *low;
        bool taken[8] = {};
        for (int r = 0; r < 8 && emulated.current % 32 == 0; r++) {
            bool& bank = taken[uintptr_t(rows(8 * m + r)) / 16 % 8];
            emulated.conflicts += bank;
            bank = true;
        }
    }
}

template <typename T> void load_matrices(uint32_t (&x)[4], const T* row) { load(x, row, false); }

template <typename T> void load_transposed(uint32_t (&x)[4], const T* row) { load(x, row, true); }

template <typename T> void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b, uint32_t below) {
    struct Fragments { uint32_t a[4], b[2]; };
    auto given = meet(Fragments{{a[0], a[1], a[2], a[3]}, {b, below}});
    int i = emulated.current % 32 / 4, j = emulated.current % 4 * 2;
    for (int n = 0; n < 4; n++)                        // row i + n / 2 * 8, column j + n % 2
        for (int k = 0; k < 16; k++) {
            int lane = k % 8 / 2;                      // of four, the one that has column k of a, and row k of b
            uint32_t of_a = given(i * 4 + lane).a[n / 2 + k / 8 * 2], of_b = given((j + n % 2) * 4 + lane).b[k / 8];
            c[n] += number<T>(of_a, k % 2) * number<T>(of_b, k % 2);
        }
}
