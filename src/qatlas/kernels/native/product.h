// The two products, for a tile of N rows. Included once by each variant.
//
// A lane is a row. N rows by N dwords of codes are loaded as they lie and turned, so that each vector holds one dword of every row; from then on
// there is nothing across lanes: groups end where they end, sums need no folding, and each x is the same for all lanes (a broadcast from memory).
// Turning costs 4 instructions a vector and is paid once for all tokens and all codes of a dword.
//
// After a group its sums D (an exact whole number, or a float) go into the row's sum in one fixed order, the groups one after another:
//
//   T = T + s D        T = T + s (D - z X)        T = T + (s D + m X)          y = step (T - zx U) + bias
#pragma once

namespace product {

using unpack::F;
using unpack::I;
using unpack::N;

struct Rows {                                            // where the rows of a tile begin; those beyond the last are the last
    const uint8_t* at[N];
    int64_t number[N];
    const uint8_t* end;                                  // of the whole matrix
    Rows(const QnMatrix& w, const QnLayout& layout, int64_t tile) {
        for (int r = 0; r < N; r++) {
            number[r] = tile * N + r < w.rows ? tile * N + r : w.rows - 1;
            at[r] = w.codes + number[r] * w.stride;
        }
        end = w.codes + (w.rows - 1) * w.stride + layout.bytes;
    }
    // N dwords of each row, from the byte `from` on; what lies beyond the end of the matrix is 0
    void load(int64_t from, int64_t bytes, int32_t* out) const {
        I turned[N];
        if (at[N - 1] + from + 4 * N <= end) {
            Ops::turn(at, from, turned);
        } else {
            uint8_t copy[N][4 * N];
            const uint8_t* rows[N];
            const int64_t there = bytes - from < 0 ? 0 : bytes - from < 4 * N ? bytes - from : 4 * N;
            for (int r = 0; r < N; r++) {
                memset(copy[r], 0, 4 * N);
                memcpy(copy[r], at[r] + from, static_cast<size_t>(there));
                rows[r] = copy[r];
            }
            Ops::turn(rows, 0, turned);
        }
        for (int j = 0; j < N; j++) Ops::store(out + j * N, turned[j]);
    }
};

struct Steps {                                           // the scale (or zero, or offset) of a group for each row; N groups are fetched at a time
    const float* p;
    const QnMatrix& w;
    const Rows& rows;
    alignas(64) float at[N][N];
    Steps(const float* p, const QnMatrix& w, const Rows& rows) : p(p), w(w), rows(rows) {}
    F of(int64_t g) {
        if (g % N == 0) {
            const int64_t n = w.groups - g < N ? w.groups - g : N;
            if (n == N && w.by_group == 1) {
                const uint8_t* from[N];
                I turned[N];
                for (int r = 0; r < N; r++) from[r] = reinterpret_cast<const uint8_t*>(p + rows.number[r] * w.by_row);
                Ops::turn(from, 4 * g, turned);
                for (int j = 0; j < N; j++) Ops::store(reinterpret_cast<int32_t*>(at[j]), turned[j]);
            } else {
                for (int64_t j = 0; j < n; j++)
                    for (int r = 0; r < N; r++) at[j][r] = p[rows.number[r] * w.by_row + (g + j) * w.by_group];
            }
        }
        return Ops::get(at[g % N]);
    }
};

constexpr int chunk(int width) { return width == 3 ? N / 4 * 3 : N; }    // dwords of a row that are turned at a time and used

template <class Each> static inline void blocks(int64_t tokens, Each each) {                       // 8 tokens at a time, then 4, 2, 1
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) each(t, 8);
    for (int b = 4; b; b /= 2)
        if (tokens - t >= b) each(t, b), t += b;
}

static inline void give(const QnJob& job, int64_t tile, int64_t t, F y) {
    const QnMatrix& w = *job.w;
    const int64_t first = tile * N, n = w.rows - first < N ? w.rows - first : N;
    float part[N];
    if (job.bias != nullptr) {
        memset(part, 0, sizeof part);
        memcpy(part, job.bias + first, static_cast<size_t>(n) * 4);
        y = Ops::plus(y, Ops::get(part));
    }
    Ops::put(part, y);
    memcpy(job.y + t * w.rows + first, part, static_cast<size_t>(n) * 4);
}

// Walks along a tile's rows: `some(w, n, at)` for n turned dwords that begin `at` dwords in the row, `end(g)` after each group
template <int W, class Some, class End> static inline void walk(const QnJob& job, const Rows& rows, Some some, End end) {
    const QnMatrix& w = *job.w;
    const QnLayout& layout = *job.layout;
    alignas(64) int32_t turned[N * N];
    const uint8_t* next = rows.at[0] + N * w.stride;     // the next tile, fetched while this one is used
    int64_t base = 0, ready = 0, at = 0;
    for (int64_t g = 0; g < w.groups; g++) {
        for (int64_t left = layout.dwords; left > 0;) {
            if (at >= ready) {
                rows.load(4 * at, layout.bytes, turned);
                base = at, ready = at + chunk(W);
                for (int line = 0; line < N * N / 16; line++)
                    if (next + 64 <= rows.end) Ops::fetch(next), next += 64;
            }
            const int64_t n = left < ready - at ? left : ready - at;
            some(turned + (at - base) * N, static_cast<int>(n), at);
            at += n, left -= n;
        }
        end(g);
    }
}

template <int W> static void integer(const QnJob& job, int64_t tile) {
    const QnMatrix& w = *job.w;
    const QnLayout& layout = *job.layout;
    const Rows rows(w, layout, tile);
    Steps scale(w.scale, w, rows), zero(w.zero, w, rows), offset(w.offset, w, rows);
    alignas(64) int32_t acc[QN_TOKENS * N];
    alignas(64) float total[QN_TOKENS * N];
    memset(acc, 0, sizeof(int32_t) * static_cast<size_t>(job.tokens * N));
    memset(total, 0, sizeof(float) * static_cast<size_t>(job.tokens * N));
    const int32_t* x = static_cast<const int32_t*>(job.x);
    walk<W>(job, rows,
        [&](const int32_t* words, int n, int64_t at) {
            const int64_t step = W == 3 ? at / 3 * 8 : at * unpack::steps(W);
            blocks(job.tokens, [&](int64_t t, int b) {
                const int32_t* from = x + t * (layout.padded / 4) + step * b;
                int32_t* to = acc + t * N;
                if (b == 8) unpack::ints<W, 8>(words, n, from, to);
                else if (b == 4) unpack::ints<W, 4>(words, n, from, to);
                else if (b == 2) unpack::ints<W, 2>(words, n, from, to);
                else unpack::ints<W, 1>(words, n, from, to);
            });
        },
        [&](int64_t g) {
            const F s = scale.of(g), z = w.zero != nullptr ? zero.of(g) : Ops::nought(), m = w.offset != nullptr ? offset.of(g) : Ops::nought();
            const int32_t* lowx = job.lowx + g * job.tokens;
            const float* sumx = job.sumx + g * job.tokens;
            for (int64_t t = 0; t < job.tokens; t++) {
                I whole = Ops::load(acc + t * N);
                if (w.shift == 1) whole = Ops::left<1>(whole);
                F d = Ops::number(Ops::add(whole, Ops::all(lowx[t])));
                if (w.part != 1) d = Ops::times(d, Ops::every(w.part));
                if (w.zero != nullptr) d = Ops::minus(d, Ops::times(z, Ops::every(sumx[t])));
                d = Ops::times(s, d);
                if (w.offset != nullptr) d = Ops::plus(d, Ops::times(m, Ops::every(sumx[t])));
                Ops::put(total + t * N, Ops::plus(Ops::get(total + t * N), d));
                Ops::store(acc + t * N, Ops::zero());
            }
        });
    float u[N];
    if (job.sums != nullptr)
        for (int r = 0; r < N; r++) u[r] = job.sums[rows.number[r]];
    for (int64_t t = 0; t < job.tokens; t++) {
        F y = Ops::get(total + t * N);
        if (job.sums != nullptr) y = Ops::minus(y, Ops::times(Ops::every(job.xzero[t]), Ops::get(u)));
        give(job, tile, t, Ops::times(Ops::every(job.step[t]), y));
    }
}

template <int W> static void real(const QnJob& job, int64_t tile) {
    const QnMatrix& w = *job.w;
    const QnLayout& layout = *job.layout;
    const Rows rows(w, layout, tile);
    Steps scale(w.scale, w, rows), zero(w.zero, w, rows), offset(w.offset, w, rows);
    alignas(64) float acc[QN_TOKENS * N], total[QN_TOKENS * N];
    memset(acc, 0, sizeof(float) * static_cast<size_t>(job.tokens * N));
    memset(total, 0, sizeof(float) * static_cast<size_t>(job.tokens * N));
    const float* x = static_cast<const float*>(job.x);
    const F unit = Ops::every(w.unit), low = Ops::every(w.low);
    F s = Ops::nought(), z = s, m = s;
    const auto steps = [&](int64_t g) {
        s = scale.of(g);
        if (w.zero != nullptr) z = zero.of(g);
        if (w.offset != nullptr) m = offset.of(g);
    };
    steps(0);
    walk<W>(job, rows,
        [&](const int32_t* words, int n, int64_t at) {
            const int64_t code = W == 3 ? at / 3 * 32 : at * unpack::codes(W);
            blocks(job.tokens, [&](int64_t t, int b) {
                const float* from = x + t * layout.padded + code * b;
                float* to = acc + t * N;
                const auto same = [](F v) __attribute__((always_inline)) { return v; };
                if (layout.mode == 1) {
                    const auto weight = [&](F v) __attribute__((always_inline)) {
                        if (w.zero != nullptr) v = Ops::minus(v, z);
                        v = Ops::times(s, v);
                        return w.offset != nullptr ? Ops::plus(v, m) : v;
                    };
                    for (int i = 0; i < b; i++) unpack::floats<W, 1>(words, n, from + i, b, w.table, unit, low, weight, to + i * N);
                } else if (b == 8) unpack::floats<W, 8>(words, n, from, 8, w.table, unit, low, same, to);
                else if (b == 4) unpack::floats<W, 4>(words, n, from, 4, w.table, unit, low, same, to);
                else if (b == 2) unpack::floats<W, 2>(words, n, from, 2, w.table, unit, low, same, to);
                else unpack::floats<W, 1>(words, n, from, 1, w.table, unit, low, same, to);
            });
        },
        [&](int64_t g) {
            const float* sumx = job.sumx + g * job.tokens;
            for (int64_t t = 0; t < job.tokens; t++) {
                F d = Ops::get(acc + t * N);
                if (layout.mode == 0) {
                    if (w.zero != nullptr) d = Ops::minus(d, Ops::times(z, Ops::every(sumx[t])));
                    d = Ops::times(s, d);
                    if (w.offset != nullptr) d = Ops::plus(d, Ops::times(m, Ops::every(sumx[t])));
                }
                Ops::put(total + t * N, Ops::plus(Ops::get(total + t * N), d));
                Ops::put(acc + t * N, Ops::nought());
            }
            if (g + 1 < w.groups) steps(g + 1);
        });
    for (int64_t t = 0; t < job.tokens; t++) give(job, tile, t, Ops::get(total + t * N));
}

static void linear(const QnJob& job, int64_t tile) {
    switch (job.w->width) {
        case QN_1: return real<1>(job, tile);
        case QN_2: return real<2>(job, tile);
        case QN_3: return real<3>(job, tile);
        case QN_4: return real<4>(job, tile);
        case QN_8: return real<8>(job, tile);
        default: return real<16>(job, tile);
    }
}

static void linear_int8(const QnJob& job, int64_t tile) {
    switch (job.w->width) {
        case QN_1: return integer<1>(job, tile);
        case QN_2: return integer<2>(job, tile);
        case QN_3: return integer<3>(job, tile);
        case QN_4: return integer<4>(job, tile);
        case QN_8: return integer<8>(job, tile);
        default: return integer<16>(job, tile);
    }
}

}  // namespace product
