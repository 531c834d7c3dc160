// The CPU kernel: two matrix products in register tiles with a softmax between them, in float32
// whatever the tensors hold.
//
// Everything is cut into blocks of 16. First keys and values are packed into panels 16 columns
// wide; the keys are normalised, rotated and transposed on the way. Then each task takes 16 queries
// of one head: scores against all keys, softmax over whole rows, product with the values.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "tile.h"

const char* instructions() {
    if (has_avx512()) return "AVX-512";
    if (has_avx2()) return "AVX2";
    return "the compiler's own choice of instructions";
}

static int64_t round_up(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// Floats from a multiple of 64 bytes on, where no vector lies in two cache lines.
struct Floats {
    float* data;

    explicit Floats(int64_t n)
        : data(static_cast<float*>(std::aligned_alloc(64, round_up(n) * sizeof(float)))) {
        if (!data) throw std::bad_alloc();
    }
    Floats(const Floats&) = delete;
    ~Floats() { std::free(data); }
};

// y = R (x / rms(x) * scale) * factor for one token of one head.
// x, scale, y: (D), turns: (D/2, 2, 2).
template <typename From, typename To>
EVERY_CPU static void norm_rope_row(const From* x, const From* scale, const float* turns, int64_t D,
                                    float factor, To* y) {
    float squares = 0;
    for (int64_t d = 0; d < D; d++) squares += float(x[d]) * float(x[d]);
    factor /= std::sqrt(squares / D + 1e-6f);
    for (int64_t i = 0; i < D / 2; i++) {
        float even = factor * float(x[2 * i]) * float(scale[2 * i]);
        float odd = factor * float(x[2 * i + 1]) * float(scale[2 * i + 1]);
        y[2 * i] = To(turns[4 * i] * even + turns[4 * i + 1] * odd);
        y[2 * i + 1] = To(turns[4 * i + 2] * even + turns[4 * i + 3] * odd);
    }
}

// Keys s .. s + 15 of one head as the columns of a panel (D, 16); zeros past the end.
// rows (16, D) is scratch.
template <typename T>
EVERY_CPU static void pack_keys(const Problem<T>& p, int64_t b, int64_t h, int64_t s, float* rows,
                                float* panel) {
    for (int64_t j = 0; j < BLOCK; j++) {
        int64_t t = s + j;
        float* row = rows + j * p.D;
        if (t < p.S) norm_rope_row(p.k(b, h, t), p.scale_k(t), p.turns(t), p.D, 1.0f, row);
        else std::fill(row, row + p.D, 0.0f);
    }
    for (int64_t j = 0; j < BLOCK; j++)
        for (int64_t d = 0; d < p.D; d++) panel[d * BLOCK + j] = rows[j * p.D + d];
}

// Values s .. s + 15 of one head as rows of its panels (D/16, tokens, 16); zeros past the end.
template <typename T>
EVERY_CPU static void pack_values(const Problem<T>& p, int64_t b, int64_t h, int64_t s,
                                  int64_t tokens, float* panels) {
    for (int64_t t = s; t < s + BLOCK; t++)
        for (int64_t d = 0; d < p.D; d += BLOCK) {
            float* row = panels + d * tokens + t * BLOCK;
            int64_t n = t < p.S ? std::min(BLOCK, p.D - d) : 0;
            for (int64_t j = 0; j < n; j++) row[j] = p.v(b, h, t)[d + j];
            std::fill(row + n, row + BLOCK, 0.0f);
        }
}

// c (16, columns) = a (16, n) panels (columns/16, n, 16).
template <int64_t ROWS>
static void product(const float* a, int64_t a_step, const float* panels, int64_t n, int64_t columns,
                    float* c, int64_t c_step) {
    static const float zeros[BLOCK] = {};
    for (int64_t j = 0; j < columns; j += BLOCK)
        for (int64_t r = 0; r < BLOCK; r += ROWS)
            tile<ROWS>(a + r * a_step, a_step, panels + j * n, BLOCK, n, zeros,
                       c + r * c_step + j, c_step);
}

// row (S) = exp(row - its largest), with zeros up to `tokens`; returns 1 / sum.
EVERY_CPU static float softmax_row(float* row, int64_t S, int64_t tokens) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t t = 0; t < S; t++) largest = row[t] > largest ? row[t] : largest;
    for (int64_t t = 0; t < S; t++) sum += row[t] = exp_negative(row[t] - largest);
    std::fill(row + S, row + tokens, 0.0f);
    return 1 / sum;
}

template <typename T>
EVERY_CPU static void scaled_row(const float* x, float factor, int64_t D, T* y) {
    for (int64_t d = 0; d < D; d++) y[d] = T(factor * x[d]);
}

template <typename T> void attention(const Problem<T>& p) {
    const auto multiply = has_avx512() ? product<8> : product<4>;
    const int64_t tokens = round_up(p.S), width = round_up(p.D);
    const int64_t of_thread = BLOCK * (p.D + tokens + width);
    Floats keys(p.B * p.H * tokens * p.D), values(p.B * p.H * tokens * width);
    Floats scratch(omp_get_max_threads() * of_thread);
#pragma omp parallel
    {
        float* query = scratch.data + omp_get_thread_num() * of_thread;  // (16, D)
        float* scores = query + BLOCK * p.D;                             // (16, tokens)
        float* sums = scores + BLOCK * tokens;                           // (16, width)
#pragma omp for collapse(3)
        for (int64_t b = 0; b < p.B; b++)
            for (int64_t h = 0; h < p.H; h++)
                for (int64_t s = 0; s < tokens; s += BLOCK) {
                    int64_t head = (b * p.H + h) * tokens;
                    pack_keys(p, b, h, s, query, keys.data + (head + s) * p.D);
                    pack_values(p, b, h, s, tokens, values.data + head * width);
                }
#pragma omp for collapse(3)
        for (int64_t b = 0; b < p.B; b++)
            for (int64_t h = 0; h < p.H; h++)
                for (int64_t s = 0; s < tokens; s += BLOCK) {
                    int64_t head = (b * p.H + h) * tokens, rows = std::min(BLOCK, p.S - s);
                    const float *head_keys = keys.data + head * p.D;
                    const float *head_values = values.data + head * width;
                    float factor[BLOCK] = {}, scale = 1 / std::sqrt(float(p.D));
                    for (int64_t r = 0; r < rows; r++)
                        norm_rope_row(p.q(b, h, s + r), p.scale_q(s + r), p.turns(s + r), p.D,
                                      scale, query + r * p.D);
                    multiply(query, p.D, head_keys, p.D, tokens, scores, tokens);
                    for (int64_t r = 0; r < rows; r++)
                        factor[r] = softmax_row(scores + r * tokens, p.S, tokens);
                    multiply(scores, tokens, head_values, tokens, width, sums, width);
                    for (int64_t r = 0; r < rows; r++)
                        scaled_row(sums + r * width, factor[r], p.D, p.out(b, h, s + r));
                }
    }
}

template <typename T> void norm_rope(const Problem<T>& p) {
#pragma omp parallel for collapse(2)
    for (int64_t b = 0; b < p.B; b++)
        for (int64_t s = 0; s < p.S; s++)
            for (int64_t h = 0; h < p.H; h++) {
                T *q = p.q(b, h, s), *k = p.k(b, h, s);
                norm_rope_row(q, p.scale_q(s), p.turns(s), p.D, 1.0f, q);
                norm_rope_row(k, p.scale_k(s), p.turns(s), p.D, 1.0f, k);
            }
}

template void attention(const Problem<float>&);
template void attention(const Problem<bfloat16>&);
template void norm_rope(const Problem<float>&);
template void norm_rope(const Problem<bfloat16>&);
