// What the module miniflux._cpu is made of: the functions that it offers.

#pragma once

#include "../attention.h"
#include "bfloat16.h"

template <typename T> void attention(const Problem<T>& p);  // out = the whole attention
template <typename T> void norm_rope(const Problem<T>& p);  // q, k = R norm(q), R norm(k), in place
void attention_reference(const Problem<float>& p);          // the specification of `attention`

struct LinearLayer {
    int64_t M, K, N;              // rows, channels in, channels out (a multiple of 16)
    const float *x, *w, *b;       // (M, K), (K, N), (N)
    float* y;                     // (M, N)
};

void linear(const LinearLayer& p);                          // y = x w + b

// y (rows, n) = gelu(x)
void gelu(int64_t rows, int64_t n, int64_t x_step, const float* x, float* y);

// y (B, S, n) = (1 + scale) layer_norm(x) + shift.
// shift and scale: (B, n), with `step` elements from one picture to the next.
void modulate(int64_t B, int64_t S, int64_t n, int64_t step, const float* x, const float* shift,
              const float* scale, float* y);

// Of the instructions that the loops were vectorised for, those that this CPU has.
const char* instructions();
