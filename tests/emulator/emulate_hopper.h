// What an H100 can besides (hopper.cuh) on a CPU, for tests, written from PTX's tables.
//
// Copies of tiles and products read and write a memory of their own, which sees what threads have written when they show it. They happen
// at once or when no thread can go on any more, as the test wants it; until then what they are to write is NaN.

#pragma once

#include "emulate_warp.h"

#define __grid_constant__
#define SHARED_TILES(name) char* name = emulated.shared

struct TileMap {                                       // of a tensor (B, H, S, D) of 16-bit numbers; a step is in bytes
    const char* data;
    int64_t sizes[4], steps[4];                        // of D, S, H, B
    int rows;                                          // of a tile
};

template <typename T> TileMap tile_map(const Rows<T>& x, const Problem<T>& p, int rows) {
    return {reinterpret_cast<const char*>(x.data), {p.D, p.S, p.H, p.B}, {2, 2 * x.token, 2 * x.head, 2 * x.batch}, rows};
}

static uint32_t shared_address(const void* x) {
    int64_t offset = static_cast<const char*>(x) - emulated.shared;
    if (offset < 0 || offset >= LARGEST_BYTES) throw std::runtime_error("this is not a place in shared memory");
    return uint32_t(offset);
}

// Of each 1024 bytes, the 16-byte pieces of row r = 0 .. 7 of 128 bytes change places: piece i is found at i ^ r.
static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// -------------------------------------------------------------------------------------------------------------- barriers

struct Phase { int32_t bytes; int8_t arrivals, missing, parity, started; };    // a barrier's 8 bytes

static Phase& phase_of(uint64_t* barrier) {
    if (shared_address(barrier) % 8) throw std::runtime_error("a barrier must begin at a multiple of 8 bytes");
    auto& phase = *reinterpret_cast<Phase*>(barrier);
    if (phase.started != 1) throw std::runtime_error("this barrier was never started");
    return phase;
}

static void settle(Phase& phase) {
    if (phase.bytes < 0) throw std::runtime_error("more bytes have come than were announced");
    if (phase.missing || phase.bytes) return;
    phase.parity ^= 1;
    phase.missing = phase.arrivals;
}

static bool barriers_are_shown;                        // to copies

static void start(uint64_t* barrier, int arrivals) {
    barriers_are_shown = false;
    *reinterpret_cast<Phase*>(barrier) = {0, int8_t(arrivals), int8_t(arrivals), 0, 1};
}

static void show_barriers() { barriers_are_shown = true; }

static void announce(uint64_t* barrier, int bytes) {
    auto& phase = phase_of(barrier);
    if (phase.missing-- == 0) throw std::runtime_error("more threads have arrived than the barrier counts");
    phase.bytes += bytes;
    settle(phase);
}

static void arrive(uint64_t* barrier) { announce(barrier, 0); }

static void wait(uint64_t* barrier, int parity) {
    phase_of(barrier);
    emulated.wait_until([=] { return phase_of(barrier).parity != parity; });
}

static void sync_group(int group) {
    int mine = ++emulated.fiber().group_meetings;
    emulated.wait_until([=] {
        for (int i = group * 128; i < group * 128 + 128; i++)
            if (!emulated.fibers[i].done && emulated.fibers[i].group_meetings < mine) return false;
        return true;
    });
}

// ---------------------------------------------------------------------------------------------------- copies and products

static void fetch_tile(void* tile, const TileMap& map, uint64_t* barrier, int d, int s, int h, int b) {
    uint32_t to = shared_address(tile);
    if (to % 128) throw std::runtime_error("a tile must begin at a multiple of 128 bytes");
    if (!barriers_are_shown) throw std::runtime_error("a copy does not see its barrier yet");
    std::memset(emulated.shown + to, 0xff, map.rows * 128);
    auto arrives = [=] {
        for (int row = 0; row < map.rows; row++)
            for (int piece = 0; piece < 8; piece++) {
                bool there = s + row < map.sizes[1] && h < map.sizes[2] && b < map.sizes[3] && d + 8 * piece < map.sizes[0];
                const char* from = map.data + (d + 8 * piece) * map.steps[0] + (s + row) * map.steps[1]
                                   + h * map.steps[2] + b * map.steps[3];
                char* piece_to = emulated.shown + swizzled(to + 128 * row + 16 * piece);
                there ? std::memcpy(piece_to, from, 16) : std::memset(piece_to, 0, 16);
            }
        auto& phase = phase_of(barrier);
        phase.bytes -= map.rows * 128;
        settle(phase);
    };
    if (emulated.hasty) arrives();
    else emulated.underway.push_back(arrives);
}

static void show_to_products() {
    for (int64_t i = 0; i < LARGEST_BYTES; i += 4)
        if (*reinterpret_cast<uint32_t*>(emulated.shared + i) != 0xffffffff) std::memcpy(emulated.shown + i, emulated.shared + i, 4);
}

// A matrix as its 64 bits describe it. In its rows of 128 bytes lie 64 columns of k where it is `k_major`, else 64 of n.
template <typename T> float element(uint64_t matrix, bool k_major, int n, int k) {
    uint32_t begin = (matrix & 0x3fff) << 4, leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
    if (matrix >> 62 != 1 || matrix >> 46 & 0xffff) throw std::runtime_error("a matrix is not described as one of 128-byte rows");
    uint32_t address = k_major ? begin + n / 8 * stride + n % 8 * 128 + k * 2
                               : begin + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
    if (address >= LARGEST_BYTES) throw std::runtime_error("a matrix lies outside shared memory");
    return number<T>(*reinterpret_cast<uint16_t*>(emulated.shown + swizzled(address)), 0);
}

template <int N> void begin_products(float (&)[N][4]) { emulated.fiber().ordered = true; }

// Adds a (2, 16), the thread's two rows, times b to c when the products happen.
template <typename T, int N, typename A> void multiply_later(float (&c)[N][4], A a, uint64_t b, bool k_major) {
    auto& fiber = emulated.fiber();
    if (!fiber.ordered) throw std::runtime_error("products begin before their registers are in order");
    auto& sums = fiber.sums[&c[0][0]];
    if (sums.empty()) sums.assign(&c[0][0], &c[0][0] + 4 * N);
    std::fill(&c[0][0], &c[0][0] + 4 * N, NAN);
    int lane = emulated.current % 32;
    fiber.products.push_back([=, &sums] {
        for (int k = 0; k < 16; k++) {
            float rows[2] = {a(0, k), a(1, k)};
            for (int column = 0; column < 2 * N; column++) {
                float x = element<T>(b, k_major, column / 2 * 8 + lane % 4 * 2 + column % 2, k);
                for (int r = 0; r < 2; r++) sums[column / 2 * 4 + 2 * r + column % 2] += rows[r] * x;
            }
        }
    });
}

template <typename T> void multiply_group(float (&c)[16][4], uint64_t a, uint64_t b) {
    int row = emulated.current % 128 / 32 * 16 + emulated.current % 32 / 4;
    multiply_later<T>(c, [=](int r, int k) {
        for (int other = row % 8; other < 64; other += 8)        // PTX does not say that a warp needs its own rows only
            if (std::isnan(element<T>(a, true, other, k))) return NAN;
        return element<T>(a, true, row + 8 * r, k);
    }, b, true);
}

template <typename T, int N> void multiply_group(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {
    auto given = meet(&a[0]);
    std::vector<const uint32_t*> lanes;                // of four, the registers: what is in them when the products happen
    for (int lane = 0; lane < 4; lane++) lanes.push_back(given(emulated.current % 32 / 4 * 4 + lane));
    multiply_later<T>(c, [lanes](int r, int k) { return number<T>(lanes[k % 8 / 2][r + k / 8 * 2], k % 2); }, b, false);
}

template <int N> void end_products(float (&c)[N][4]) {
    auto& fiber = emulated.fiber();
    bool over = false;
    auto happen = [&] {
        for (auto& product : fiber.products) product();
        over = true;
    };
    if (emulated.hasty) happen();
    else emulated.underway.push_front(happen);         // copies take even longer
    emulated.wait_until([&] { return over; });
    auto& sums = fiber.sums[&c[0][0]];
    if (!sums.empty()) std::copy(sums.begin(), sums.end(), &c[0][0]);
    fiber.products.clear();
    fiber.sums.clear();
    fiber.ordered = false;
    __syncwarp();                                      // a warp's lanes go on together
}
