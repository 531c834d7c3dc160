// A linear layer for few rows: y = x W^T + b, where W is stored by columns, as (K, N).
//
// Each thread takes columns of 16: what it reads of W stays in its cache while all rows pass by, and nothing is copied.

#include "kernels.h"
#include "tile.h"

template <int64_t ROWS> static void columns(const LinearLayer& p, int64_t j) {
    int64_t r = 0;
    for (; r + ROWS <= p.M; r += ROWS) tile<ROWS>(p.x + r * p.K, p.K, p.w + j, p.N, p.K, p.b + j, p.y + r * p.N + j, p.N);
    for (; r < p.M; r++) tile<1>(p.x + r * p.K, p.K, p.w + j, p.N, p.K, p.b + j, p.y + r * p.N + j, p.N);
}

void linear(const LinearLayer& p) {
    const auto each = has_avx512() ? columns<8> : columns<4>;
#pragma omp parallel for
    for (int64_t j = 0; j < p.N; j += BLOCK) each(p, j);
}
