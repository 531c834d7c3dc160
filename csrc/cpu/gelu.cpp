// The MLPs' activation: gelu(x) = x / 2 (1 + tanh u) = x / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).

#include "kernels.h"
#include "tile.h"

EVERY_CPU static void gelu_row(const float* row, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) {
        float x = row[i] < -100.0f ? -100.0f : row[i];                // where it is zero; a NaN passes
        float twice = 1.5957691216f * x * (1 + 0.044715f * x * x);
        float e = exp_negative(twice < 0 ? twice : -twice);           // never above 1
        y[i] = x * (twice < 0 ? e : 1.0f) / (1 + e);
    }
}

void gelu(int64_t rows, int64_t n, int64_t x_step, const float* x, float* y) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) gelu_row(x + r * x_step, n, y + r * n);
}
