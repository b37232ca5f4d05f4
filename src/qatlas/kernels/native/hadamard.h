// The Walsh-Hadamard transform of rows of n = 2^k floats, in cache: as few walks over a row as registers allow. One walk takes up to `RADIX` vectors
// that lie a stride apart through all their sums and differences; the first also does those inside a vector. A row of 4096 is walked twice.
// Included once by each variant, inside its namespace.
#pragma once

namespace hadamard {

constexpr int RADIX = Ops::N == 16 ? 16 : 8;

template <int R> static inline void butterflies(Ops::F* v) {
#pragma GCC unroll 8
    for (int h = 1; h < R; h *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
            if (!(i & h)) {
                const Ops::F a = v[i], b = v[i + h];
                v[i] = Ops::plus(a, b), v[i + h] = Ops::minus(a, b);
            }
}

static inline Ops::F lanes(Ops::F v, int64_t n) {       // the steps inside a vector, of blocks of n
    if (n > 1 && Ops::N > 1) v = Ops::cross<1>(v);
    if (n > 2 && Ops::N > 2) v = Ops::cross<2>(v);
    if constexpr (Ops::N > 4) {
        if (n > 4) v = Ops::cross<4>(v);
    }
    if constexpr (Ops::N > 8) {
        if (n > 8) v = Ops::cross<8>(v);
    }
    return v;
}

template <int R> static void walk(const float* x, float* y, int64_t vectors, int64_t stride, bool first, bool last, float factor) {
    const Ops::F by = Ops::every(factor);
    for (int64_t base = 0; base < vectors; base += stride * R)
        for (int64_t i = base; i < base + stride; i++) {
            Ops::F v[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) v[r] = Ops::get(x + (i + r * stride) * Ops::N);
            if (first) {
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) v[r] = lanes(v[r], Ops::N);
            }
            butterflies<R>(v);
            if (last) {
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) v[r] = Ops::times(v[r], by);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) Ops::put(y + (i + r * stride) * Ops::N, v[r]);
        }
}

static void plain(const float* x, float* y, int64_t n, float factor) {        // one block in plain words: what is left over of small ones
    float v[Ops::N];
    for (int64_t i = 0; i < n; i++) v[i] = x[i];
    for (int64_t h = 1; h < n; h *= 2)
        for (int64_t i = 0; i < n; i++)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
    for (int64_t i = 0; i < n; i++) y[i] = v[i] * factor;
}

static void run(const float* x, float* y, int64_t blocks, int64_t n, float factor) {
    if (n <= Ops::N) {                                  // several blocks a vector
        const int64_t total = blocks * n, whole = total / Ops::N * Ops::N;
        for (int64_t i = 0; i < whole; i += Ops::N) Ops::put(y + i, Ops::times(lanes(Ops::get(x + i), n), Ops::every(factor)));
        for (int64_t i = whole; i < total; i += n) plain(x + i, y + i, n, factor);
        return;
    }
    const int64_t vectors = n / Ops::N;
    for (int64_t b = 0; b < blocks; b++) {
        const float* from = x + b * n;
        float* to = y + b * n;
        for (int64_t stride = 1; stride < vectors;) {
            const int64_t left = vectors / stride;
            const int64_t r = left >= RADIX ? RADIX : left;
            const bool first = stride == 1, last = r == left;
            if (r == 2) walk<2>(from, to, vectors, stride, first, last, factor);
            else if (r == 4) walk<4>(from, to, vectors, stride, first, last, factor);
            else if (r == 8) walk<8>(from, to, vectors, stride, first, last, factor);
            else walk<16>(from, to, vectors, stride, first, last, factor);
            stride *= r, from = to;
        }
    }
}

}  // namespace hadamard
