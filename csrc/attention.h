// The problem that every kernel here solves, and the names that all of them use:
//
//     out = softmax(R norm(q) (R norm(k))^T / sqrt(D)) v        for each picture and head on its own
//
//     B  pictures       S  tokens, text before image      norm  x / rms(x) * scale over the D channels of a head
//     H  heads          L  how many of them are text      R     turns the channel pair (2i, 2i+1) by the token's position
//     D  channels of a head, an even number
//
// The same mathematics in Python: miniflux/networks/attention.py.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EVERYWHERE __host__ __device__
#else
#define EVERYWHERE
#endif

// A tensor (B, H, S, D) somewhere in memory: channels are neighbours, the other steps are given in elements.
template <typename T> struct Rows {
    T* data;
    int64_t batch, head, token;

    EVERYWHERE T* operator()(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * token; }
};

template <typename T> struct Problem {
    int64_t B, H, S, L, D;
    Rows<T> q, k, v, out;
    const T *text, *image;        // (2, D): scales of q and k in text rows and in image rows
    const float* pe;              // (S, D/2, 2, 2): [[cos, -sin], [sin, cos]] of each token and pair

    EVERYWHERE const T* scale_q(int64_t s) const { return s < L ? text : image; }
    EVERYWHERE const T* scale_k(int64_t s) const { return scale_q(s) + D; }
    EVERYWHERE const float* turns(int64_t s) const { return pe + s * 2 * D; }
};
