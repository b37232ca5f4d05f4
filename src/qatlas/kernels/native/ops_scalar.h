// Plain C++ that any machine runs: four lanes in a loop, which a compiler may make vectors of. What each function means stands here; the other ops_*.h
// have the same functions in their machine's words.
#pragma once
#include <stdint.h>
#include <string.h>

struct Ops {
    static constexpr int N = 4;                         // lanes: rows of a tile
    static constexpr bool WIDE = true;                  // dp takes codes up to 255; else up to 15
    struct I { int32_t at[N]; };
    struct F { float at[N]; };
#define QN_EACH for (int i = 0; i < N; i++)
    // out[j] has in lane r the j-th dword of row r: N rows, N dwords each, at rows[r] + at
    static inline void turn(const uint8_t* const* rows, int64_t at, I* out) {
        for (int r = 0; r < N; r++)
            for (int j = 0; j < N; j++) memcpy(&out[j].at[r], rows[r] + at + 4 * j, 4);
    }
    static inline I zero() { return I{{0, 0, 0, 0}}; }
    static inline I all(int32_t v) { I o; QN_EACH o.at[i] = v; return o; }
    static inline I load(const int32_t* p) { I o; memcpy(o.at, p, sizeof o.at); return o; }
    static inline void store(int32_t* p, I v) { memcpy(p, v.at, sizeof v.at); }
    static inline I both(I a, I b) { QN_EACH a.at[i] &= b.at[i]; return a; }
    static inline I either(I a, I b) { QN_EACH a.at[i] |= b.at[i]; return a; }
    static inline I add(I a, I b) { QN_EACH a.at[i] = static_cast<int32_t>(static_cast<uint32_t>(a.at[i]) + static_cast<uint32_t>(b.at[i])); return a; }
    template <int S> static inline I right(I a) { QN_EACH a.at[i] = static_cast<int32_t>(static_cast<uint32_t>(a.at[i]) >> S); return a; }
    template <int S> static inline I signed_right(I a) { QN_EACH a.at[i] >>= S; return a; }
    template <int S> static inline I left(I a) { QN_EACH a.at[i] = static_cast<int32_t>(static_cast<uint32_t>(a.at[i]) << S); return a; }
    // each lane: acc + the products of four unsigned bytes of codes with four signed bytes at x
    static inline I dp(I acc, I codes, const int32_t* x) {
        int8_t q[4];
        memcpy(q, x, 4);
        QN_EACH {
            int32_t sum = 0;
            for (int b = 0; b < 4; b++) sum += static_cast<int32_t>((static_cast<uint32_t>(codes.at[i]) >> (8 * b)) & 255) * q[b];
            acc.at[i] = static_cast<int32_t>(static_cast<uint32_t>(acc.at[i]) + static_cast<uint32_t>(sum));
        }
        return acc;
    }
    // four codes of 3 bits from bit S of a lane on, one a byte
    template <int S> static inline I three(I a) {
        a = right<S>(a);
        return either(either(both(a, all(7)), left<5>(both(a, all(0x38)))), either(left<10>(both(a, all(0x1c0))), left<15>(both(a, all(0xe00)))));
    }
    // The leading digit of base three of each byte, and the bytes with it taken away. A byte is f + 128, f / 256 = 0.d1d2d3d4d5 in base three: so a
    // digit is two comparisons of signed bytes, and three times a byte (modulo 256) moves the next digit to the front.
    static inline I digit(I a) {
        int8_t b[4 * N];
        memcpy(b, a.at, sizeof b);
        for (int i = 0; i < 4 * N; i++) b[i] = static_cast<int8_t>((b[i] > -43) + (b[i] > 42));
        memcpy(a.at, b, sizeof b);
        return a;
    }
    static inline I rest(I a) {
        uint8_t b[4 * N];
        memcpy(b, a.at, sizeof b);
        for (int i = 0; i < 4 * N; i++) b[i] = static_cast<uint8_t>(3 * b[i]);
        memcpy(a.at, b, sizeof b);
        return a;
    }
    static inline F nought() { return F{{0, 0, 0, 0}}; }
    static inline F every(float v) { F o; QN_EACH o.at[i] = v; return o; }
    static inline F get(const float* p) { F o; memcpy(o.at, p, sizeof o.at); return o; }
    static inline void put(float* p, F v) { memcpy(p, v.at, sizeof v.at); }
    static inline F number(I a) { F o; QN_EACH o.at[i] = static_cast<float>(a.at[i]); return o; }
    static inline F plus(F a, F b) { QN_EACH a.at[i] += b.at[i]; return a; }
    static inline F minus(F a, F b) { QN_EACH a.at[i] -= b.at[i]; return a; }
    static inline F times(F a, F b) { QN_EACH a.at[i] *= b.at[i]; return a; }
    static inline F fused(F acc, F v, const float* x) { QN_EACH acc.at[i] += v.at[i] * x[0]; return acc; }      // acc + v x[0]
    // table[the low B bits of each lane], bits above them anything; the table holds its 2^B values again and again, 16 in all
    template <int B> static inline F look(const float* table, I a) { F o; QN_EACH o.at[i] = table[a.at[i] & 15]; return o; }
    // lanes that lie H apart: the sum in the lower, the difference in the upper
    template <int H> static inline F cross(F a) {
        F o;
        QN_EACH o.at[i] = i & H ? a.at[i ^ H] - a.at[i] : a.at[i] + a.at[i ^ H];
        return o;
    }
    static inline void fetch(const void*) {}
#undef QN_EACH
};
