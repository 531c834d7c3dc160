// CUDA's threads on a CPU, for tests: the kernels' own source runs here, thread by thread, and mistakes show.
//
// Every thread of a block is a fiber with a stack of its own. It runs until it waits: at a barrier for its block, at a meeting (say, a
// shuffle) for its warp. The warp of the lowest number runs ahead as far as it can, so what another warp should have written first is
// not there yet; or, where the test is hasty, that of the highest. Shared memory begins full of NaN. A block that waits for ever is an error.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __launch_bounds__(threads)
#define SHARED_FLOATS(name) float* name = reinterpret_cast<float*>(emulated.shared)

struct Index { unsigned x = 0, y = 0, z = 0; };
static Index threadIdx, blockIdx, blockDim;
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

constexpr int64_t SHARED_BYTES = 99 << 10;             // of a block, on the smallest GPUs
constexpr int64_t STATIC_BYTES = 48 << 10;             // of these for arrays whose size the compiler knows
constexpr int64_t LARGEST_BYTES = 227 << 10;           // of a block, on an H100

struct Copy { void* to; const void* from; };           // of 16 bytes, on its way; from nothing: zeros

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 15);
    bool done, waits_for_block;
    int meetings;
    int64_t shared;                                    // bytes given out
    uint32_t given[2][6];                              // at the last two meetings
    std::vector<Copy> copies;
    std::function<bool()> until;                       // what it waits for, if anything else
    int group_meetings;
    bool ordered;                                      // whether products may begin (emulate_hopper.h)
    std::vector<std::function<void()>> products;
    std::map<float*, std::vector<float>> sums;         // what these add to
};

struct Emulated {
    std::vector<Fiber> fibers;
    alignas(1024) char shared[LARGEST_BYTES];
    alignas(1024) char shown[LARGEST_BYTES];           // the same as copies and products of a group see it
    std::deque<std::function<void()>> underway;        // what happens by itself, here as late as it may: when no thread can go on
    int64_t conflicts = 0;                             // reads of shared memory that had to wait for another
    bool hasty = false;                                // whether copies arrive at once, or as late as they may
    ucontext_t main;
    unsigned current = 0;
    std::function<void()> body;
    std::string error;

    Fiber& fiber() { return fibers[current]; }
    void wait() { swapcontext(&fiber().context, &main); }
    void wait_until(std::function<bool()> condition) {
        fiber().until = std::move(condition);
        wait();
        fiber().until = nullptr;
    }

    static void enter();

    bool may_go_on(unsigned i) {                       // Note: a meeting is over when every lane of the warp has come to it
        if (fibers[i].done || fibers[i].waits_for_block) return false;
        if (fibers[i].until && !fibers[i].until()) return false;
        for (unsigned lane = i / 32 * 32; lane < i / 32 * 32 + 32; lane++)
            if (!fibers[lane].done && fibers[lane].meetings < fibers[i].meetings) return false;
        return true;
    }

    bool run_warp(unsigned first) {                    // each lane as far as its next wait; whether any could go on
        bool moved = false;
        for (current = first; current < first + 32; current++)
            if (may_go_on(current)) {
                moved = true;
                threadIdx.x = current;
                swapcontext(&main, &fiber().context);
            }
        return moved;
    }

    void run_block(unsigned threads, std::function<void()> kernel) {
        fibers.resize(threads);
        std::memset(shared, 0xff, sizeof shared);      // NaN, as floats and as numbers of 16 bits
        std::memset(shown, 0xff, sizeof shown);
        underway.clear();
        body = std::move(kernel);
        for (auto& fiber : fibers) {
            fiber.done = fiber.waits_for_block = false;
            fiber.meetings = fiber.group_meetings = 0;
            fiber.shared = 0;
            fiber.copies.clear();
            fiber.until = nullptr;
            fiber.ordered = false;
            fiber.products.clear();
            fiber.sums.clear();
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &main;
            makecontext(&fiber.context, enter, 0);
        }
        for (;;) {
            bool moved = false;
            for (unsigned first = 0; first < threads && !moved; first += 32)
                while (run_warp(hasty ? threads - 32 - first : first)) moved = true;
            if (moved && error.empty()) continue;
            unsigned finished = 0, waiting = 0;
            for (auto& fiber : fibers) finished += fiber.done, waiting += fiber.waits_for_block;
            if (!underway.empty() && error.empty()) {
                if (finished == threads) throw std::runtime_error("a block has ended before what it began");
                auto next = std::move(underway.front());
                underway.pop_front();
                next();
                continue;
            }
            if (finished < threads && waiting < threads && error.empty()) error = "some threads wait for ever";
            if (!error.empty()) throw std::runtime_error(std::exchange(error, ""));
            if (finished == threads) return;
            for (auto& fiber : fibers) fiber.waits_for_block = false;
        }
    }
};
static Emulated emulated;

void Emulated::enter() {
    try {
        emulated.body();
    } catch (const std::exception& exception) {        // Note: nothing may be thrown out of a fiber
        emulated.error = exception.what();
    }
    emulated.fiber().done = true;
}

static void __syncthreads() {
    emulated.fiber().waits_for_block = true;
    emulated.wait();
}

// Every lane of a warp gives something, and when all have, sees what the others gave: meet(mine)(lane).
template <typename T> static auto meet(const T& mine) {
    auto& fiber = emulated.fiber();
    int table = ++fiber.meetings % 2;                  // one of two in turn: a lane that is ahead overwrites nothing that is still read
    std::memcpy(fiber.given[table], &mine, sizeof mine);
    emulated.wait();
    return [table](unsigned lane) {
        T theirs;
        std::memcpy(&theirs, emulated.fibers[emulated.current / 32 * 32 + lane].given[table], sizeof theirs);
        return theirs;
    };
}

static float __shfl_sync(unsigned, float x, int lane) { return meet(x)(lane); }

static float __shfl_xor_sync(unsigned, float x, int step) { return meet(x)(emulated.current % 32 ^ step); }

static bool __any_sync(unsigned, bool x) {
    auto given = meet(x);
    bool any = false;
    for (int lane = 0; lane < 32; lane++) any |= given(lane);
    return any;
}

static void __syncwarp() { meet(0); }

template <typename Kernel, typename... Arguments> void launch(Kernel kernel, Index grid, unsigned threads, Arguments... arguments) {
    blockDim.x = threads;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) emulated.run_block(threads, [&] { kernel(arguments...); });
}
