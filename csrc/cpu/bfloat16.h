// The second type of number that the kernels take.

#pragma once

#include <cstdint>
#include <cstring>

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The upper half of a float32.
struct bfloat16 {
    uint16_t half;

    operator float() const { return from_bits(uint32_t(half) << 16); }

    explicit bfloat16(float x) {                            // to the nearest, ties to even
        uint32_t bits = to_bits(x);
        // Note: rounding would turn some NaNs into zeros.
        half = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    }
};
