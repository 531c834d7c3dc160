// The specification: attention in loops that can be checked by hand. The fast kernels are tested
// against it.

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"

// y = R (x / rms(x) * scale) for one token of one head: x, scale, y (D), turns (D/2, 2, 2).
static void norm_rope(const float* x, const float* scale, const float* turns, int64_t D, float* y) {
    float squares = 0;
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    float rms = std::sqrt(squares / D + 1e-6f);
    for (int64_t d = 0; d < D; d += 2, turns += 4) {
        float even = x[d] / rms * scale[d], odd = x[d + 1] / rms * scale[d + 1];
        y[d] = turns[0] * even + turns[1] * odd;
        y[d + 1] = turns[2] * even + turns[3] * odd;
    }
}

void attention_reference(const Problem<float>& p) {
    std::vector<float> keys(p.S * p.D), query(p.D), weights(p.S);
    for (int64_t b = 0; b < p.B; b++)
        for (int64_t h = 0; h < p.H; h++) {
            for (int64_t s = 0; s < p.S; s++)
                norm_rope(p.k(b, h, s), p.scale_k(s), p.turns(s), p.D, &keys[s * p.D]);
            for (int64_t s = 0; s < p.S; s++) {
                norm_rope(p.q(b, h, s), p.scale_q(s), p.turns(s), p.D, query.data());
                float largest = -INFINITY, total = 0;
                for (int64_t t = 0; t < p.S; t++) {
                    float dot = 0;
                    for (int64_t d = 0; d < p.D; d++) dot += query[d] * keys[t * p.D + d];
                    weights[t] = dot / std::sqrt(float(p.D));
                    largest = std::max(largest, weights[t]);
                }
                for (float& weight : weights) total += weight = std::exp(weight - largest);
                float* out = p.out(b, h, s);
                std::fill(out, out + p.D, 0.0f);
                for (int64_t t = 0; t < p.S; t++)
                    for (int64_t d = 0; d < p.D; d++)
                        out[d] += weights[t] / total * p.v(b, h, t)[d];
            }
        }
}
