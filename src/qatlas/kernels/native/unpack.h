// From turned dwords to sums: for each width, how a dword of codes becomes vectors of bytes (or floats), and which x stands beside each.
//
//   1, 2, 4 bits    plane p: (w >> p W) & mask, the codes p, p + 8/W, p + 16/W, p + 24/W. Where dp takes wide codes and registers suffice, the shift is
//                   left out: each plane sums into registers of its own, 2^(p W) times too large, and the sum is shifted
//   3 bits          three dwords are 32 codes: four pieces of 24 bits, two vectors of four codes each
//   8 bits          as they are, or as two halves of 4 bits where dp does not take them
//   ternary         five digits of base three a byte, the leading first
#pragma once

namespace unpack {

typedef Ops::I I;
typedef Ops::F F;
constexpr int N = Ops::N;

constexpr int steps(int w) { return w == 1 ? 8 : w == 2 ? 4 : w == 4 ? 2 : w == 8 ? 1 : w == 16 ? 5 : 0; }      // vectors of a dword
constexpr int codes(int w) { return w == 16 ? 20 : w == 3 ? 0 : 32 / w; }                                       // of a dword

static inline void pieces(const int32_t* w, I* out) {                    // 3 bits: three dwords -> four times 24 bits, the rest anything
    const I a = Ops::load(w), b = Ops::load(w + N), c = Ops::load(w + 2 * N);
    out[0] = a;
    out[1] = Ops::either(Ops::right<24>(a), Ops::left<8>(b));
    out[2] = Ops::either(Ops::right<16>(b), Ops::left<16>(c));
    out[3] = Ops::right<8>(c);
}

// acc (T, N) += the products of n dwords of codes at w with x: (steps, T) dwords
template <int W, int T> static void ints(const int32_t* w, int n, const int32_t* x, int32_t* acc) {
    constexpr int S = steps(W);
    if constexpr (W == 3) {
        I sum[2][T];
        for (int t = 0; t < T; t++) sum[0][t] = Ops::load(acc + t * N), sum[1][t] = Ops::zero();
        for (int j = 0; j < n; j += 3, x += 8 * T) {
            I piece[4];
            pieces(w + j * N, piece);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                const I low = Ops::three<0>(piece[c]), high = Ops::three<12>(piece[c]);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    sum[0][t] = Ops::dp(sum[0][t], low, x + 2 * c * T + t);
                    sum[1][t] = Ops::dp(sum[1][t], high, x + (2 * c + 1) * T + t);
                }
            }
        }
        for (int t = 0; t < T; t++) Ops::store(acc + t * N, Ops::add(sum[0][t], sum[1][t]));
    } else if constexpr (Ops::WIDE && (W == 1 || W == 2 || W == 4) && S * T <= 16) {
        constexpr int U = S * T >= 4 ? 1 : 2;                            // enough sums at a time that none waits for itself
        I sum[U][S][T];
#pragma GCC unroll 16
        for (int i = 0; i < U * S * T; i++) sum[i / (S * T)][i / T % S][i % T] = Ops::zero();
        const auto one = [&](int j, int u) __attribute__((always_inline)) {
            const I a = Ops::load(w + j * N);
#pragma GCC unroll 8
            for (int p = 0; p < S; p++) {
                const I c = Ops::both(a, Ops::all(static_cast<int32_t>(0x01010101u * (((1u << W) - 1) << (p * W)))));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) sum[u][p][t] = Ops::dp(sum[u][p][t], c, x + (j * S + p) * T + t);
            }
        };
        int j = 0;
        for (; j + U <= n; j += U)
#pragma GCC unroll 2
            for (int u = 0; u < U; u++) one(j + u, u);
        for (; j < n; j++) one(j, 0);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            I all = Ops::load(acc + t * N);
#pragma GCC unroll 2
            for (int u = 0; u < U; u++) {
                all = Ops::add(all, sum[u][0][t]);
                if constexpr (S > 1) all = Ops::add(all, Ops::signed_right<W>(sum[u][1][t]));
                if constexpr (S > 2) {
                    all = Ops::add(all, Ops::signed_right<2 * W>(sum[u][2][t]));
                    all = Ops::add(all, Ops::signed_right<3 * W>(sum[u][3][t]));
                }
                if constexpr (S > 4) {
                    all = Ops::add(all, Ops::add(Ops::signed_right<4 * W>(sum[u][4][t]), Ops::signed_right<5 * W>(sum[u][5][t])));
                    all = Ops::add(all, Ops::add(Ops::signed_right<6 * W>(sum[u][6][t]), Ops::signed_right<7 * W>(sum[u][7][t])));
                }
            }
            Ops::store(acc + t * N, all);
        }
    } else {
        constexpr int U = T >= 4 ? 1 : T == 2 ? 2 : 4;
        I sum[U][T], high[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            high[t] = Ops::zero();
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) sum[u][t] = u == 0 ? Ops::load(acc + t * N) : Ops::zero();
        }
        const auto one = [&](int j, int u) __attribute__((always_inline)) {
            I a = Ops::load(w + j * N);
#pragma GCC unroll 8
            for (int p = 0; p < S; p++) {
                const I c = W == 16 ? Ops::digit(a) : W == 8 ? a : Ops::both(a, Ops::all(static_cast<int32_t>(0x01010101u * ((1u << W) - 1))));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const int32_t* at = x + (j * S + p) * T + t;
                    I& to = sum[(u + p) % U][t];
                    if constexpr (W == 8 && !Ops::WIDE) {
                        const I half = Ops::all(0x0f0f0f0f);
                        to = Ops::dp(to, Ops::both(c, half), at);
                        high[t] = Ops::dp(high[t], Ops::both(Ops::right<4>(c), half), at);
                    } else {
                        to = Ops::dp(to, c, at);
                    }
                }
                if (p + 1 < S) a = W == 16 ? Ops::rest(a) : Ops::right<W == 16 ? 0 : W>(a);
            }
        };
        int j = 0;
        for (; j + U <= n; j += U)
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) one(j + u, u);
        for (; j < n; j++) one(j, 0);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            I all = sum[0][t];
#pragma GCC unroll 4
            for (int u = 1; u < U; u++) all = Ops::add(all, sum[u][t]);
            if constexpr (W == 8 && !Ops::WIDE) all = Ops::add(all, Ops::left<4>(high[t]));
            Ops::store(acc + t * N, all);
        }
    }
}

// As ints, with floats: `value` maps v to what is summed (v itself, or the weight). x: (codes, stride) floats, T of them at a time
template <int W, int T, class Value>
static inline void floats(const int32_t* w, int n, const float* x, int stride, const float* table, F unit, F low, Value value, float* acc) {
    constexpr int U = T >= 4 ? 1 : 4 / T;
    F sum[U][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[u][t] = u == 0 ? Ops::get(acc + t * N) : Ops::nought();
    const auto one = [&](F v, int i) __attribute__((always_inline)) {
        v = value(v);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[i % U][t] = Ops::fused(sum[i % U][t], v, x + t);
        x += stride;
    };
    for (int j = 0; j < n; j += W == 3 ? 3 : 1) {
        if constexpr (W == 3) {
            I piece[4];
            pieces(w + j * N, piece);
            for (int c = 0; c < 4; c++) {
                I a = piece[c];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++, a = Ops::right<3>(a)) one(Ops::look<3>(table, a), i);
            }
        } else if constexpr (W == 16) {
            I a = Ops::load(w + j * N);
            for (int p = 0; p < 5; p++, a = Ops::rest(a)) {
                I digit = Ops::digit(a);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++, digit = Ops::right<8>(digit)) one(Ops::look<2>(table, digit), i);
            }
        } else if constexpr (W == 8) {
            I a = Ops::load(w + j * N);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, a = Ops::right<8>(a))
                one(Ops::plus(Ops::times(Ops::number(Ops::both(a, Ops::all(255))), unit), low), i);
        } else {
            I a = Ops::load(w + j * N);
            constexpr int C = 32 / W;
#pragma GCC unroll 16
            for (int i = 0; i < C; i++, a = Ops::right<W>(a)) one(Ops::look<W>(table, a), i);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        F all = sum[0][t];
#pragma GCC unroll 4
        for (int u = 1; u < U; u++) all = Ops::plus(all, sum[u][t]);
        Ops::put(acc + t * N, all);
    }
}

}  // namespace unpack
