// What a small network does between its attentions, for few rows: linear layers, the GELU, the
// modulated norm.

#include <cmath>

#include "kernels.h"
#include "tile.h"

// Columns j .. j + 15 of y = x w + b. What is read of w stays in the core's cache while all rows
// pass by; nothing is copied.
template <int64_t ROWS> static void linear_columns(const LinearLayer& p, int64_t j) {
    const float *w = p.w + j, *b = p.b + j;
    float* y = p.y + j;
    int64_t r = 0;
    for (; r + ROWS <= p.M; r += ROWS)
        tile<ROWS>(p.x + r * p.K, p.K, w, p.N, p.K, b, y + r * p.N, p.N);
    for (; r < p.M; r++)
        tile<1>(p.x + r * p.K, p.K, w, p.N, p.K, b, y + r * p.N, p.N);
}

void linear(const LinearLayer& p) {
    const auto columns = has_avx512() ? linear_columns<8> : linear_columns<4>;
#pragma omp parallel for
    for (int64_t j = 0; j < p.N; j += BLOCK) columns(p, j);
}

// x / 2 (1 + tanh u) = x / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
EVERY_CPU static void gelu_row(const float* row, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) {
        float x = row[i] < -100.0f ? -100.0f : row[i];      // where it is zero; a NaN passes
        float twice = 1.5957691216f * x * (1 + 0.044715f * x * x);
        float e = exp_negative(twice < 0 ? twice : -twice);           // never above 1
        y[i] = x * (twice < 0 ? e : 1.0f) / (1 + e);
    }
}

void gelu(int64_t rows, int64_t n, int64_t x_step, const float* x, float* y) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) gelu_row(x + r * x_step, n, y + r * n);
}

// (1 + scale) (x - mean) / sqrt(variance + 1e-6) + shift
EVERY_CPU static void modulate_row(const float* x, const float* shift, const float* scale,
                                   int64_t n, float* y) {
    float sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    float mean = sum / n;
    for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float factor = 1 / std::sqrt(squares / n + 1e-6f);
    for (int64_t i = 0; i < n; i++)
        y[i] = (1 + scale[i]) * (x[i] - mean) * factor + shift[i];
}

void modulate(int64_t B, int64_t S, int64_t n, int64_t step, const float* x, const float* shift,
              const float* scale, float* y) {
#pragma omp parallel for collapse(2)
    for (int64_t b = 0; b < B; b++)
        for (int64_t s = 0; s < S; s++) {
            int64_t row = (b * S + s) * n;
            modulate_row(x + row, shift + b * step, scale + b * step, n, y + row);
        }
}
