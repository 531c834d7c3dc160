// CUDA's threads on a CPU, for tests: the kernels' own source runs here, thread by thread, and mistakes show.
//
// Every thread of a block is a fiber with a stack of its own. It runs until it waits: at a barrier for its block, at a shuffle for its
// warp. The warp of the lowest number runs ahead as far as it can, so what another warp should have written first is not there yet;
// and shared memory begins full of NaN. A block that waits for ever is an error.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define SHARED(name) float* name = emulated.shared.data()

struct Index { unsigned x = 0, y = 0, z = 0; };
static Index threadIdx, blockIdx, blockDim;
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

struct Emulated {
    struct Fiber { ucontext_t context; std::vector<char> stack; bool done = false, waits_for_block = false; int shuffles = 0; float given = 0; };
    std::vector<Fiber> fibers;
    std::vector<float> shared;
    ucontext_t main;
    unsigned current = 0;
    std::function<void()> body;

    static void enter();
    void wait() { swapcontext(&fibers[current].context, &main); }

    bool may_go_on(unsigned i) {                       // Note: a shuffle is over when every lane of the warp has come to it
        Fiber& fiber = fibers[i];
        if (fiber.done) return false;
        if (fiber.waits_for_block) return false;
        for (unsigned lane = i / 32 * 32; lane < i / 32 * 32 + 32; lane++)
            if (!fibers[lane].done && fibers[lane].shuffles < fiber.shuffles) return false;
        return true;
    }

    void run_block(unsigned threads, int64_t floats, std::function<void()> kernel) {
        fibers = std::vector<Fiber>(threads);
        shared.assign(floats, std::numeric_limits<float>::quiet_NaN());
        body = std::move(kernel);
        for (auto& fiber : fibers) {
            fiber.stack.resize(1 << 16);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &main;
            makecontext(&fiber.context, enter, 0);
        }
        for (;;) {
            unsigned next = 0, finished = 0, waiting = 0;
            for (auto& fiber : fibers) finished += fiber.done, waiting += fiber.waits_for_block;
            if (finished == threads) return;
            while (next < threads && !may_go_on(next)) next++;
            if (next == threads) {
                if (waiting + finished < threads || finished) throw std::runtime_error("some threads wait for ever");
                for (auto& fiber : fibers) fiber.waits_for_block = false;
                continue;
            }
            current = next;
            threadIdx.x = next;
            swapcontext(&main, &fibers[next].context);
        }
    }
};
static Emulated emulated;

void Emulated::enter() {
    emulated.body();
    emulated.fibers[emulated.current].done = true;
}

static void __syncthreads() {
    emulated.fibers[emulated.current].waits_for_block = true;
    emulated.wait();
}

static float __shfl_sync(unsigned, float x, int lane) {
    unsigned me = emulated.current;
    auto& mine = emulated.fibers[me];
    mine.given = x;
    mine.shuffles++;
    emulated.wait();                                   // all have given
    float taken = emulated.fibers[me / 32 * 32 + lane].given;
    mine.shuffles++;
    emulated.wait();                                   // all have taken
    return taken;
}

static float __shfl_xor_sync(unsigned all, float x, int step) { return __shfl_sync(all, x, int(emulated.current % 32) ^ step); }

template <typename Kernel, typename Problem> void launch(Kernel kernel, Index grid, unsigned threads, int64_t floats, const Problem& p) {
    blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) emulated.run_block(threads, floats, [&] { kernel(p); });
}
