// What the module miniflux._cuda offers. `stream` is a cudaStream_t; what fails is thrown as std::runtime_error.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../attention.h"

template <typename T> void norm_rope(const Problem<T>& p, void* stream);  // q = R norm(q) and k = R norm(k), in place
template <typename T> void naive(const Problem<T>& p, void* stream);      // out = the whole attention; overwrites q and k
template <typename T> void tiles(const Problem<T>& p, void* stream);      // the same
template <typename T> void mma(const Problem<T>& p, void* stream);        // the same, for those problems that mma_takes
template <typename T> void wgmma(const Problem<T>& p, void* stream);      // the same with heads of 64 or 128 channels, on an H100
template <typename T> void attention(const Problem<T>& p, void* stream);  // mma where it can be, tiles elsewhere
