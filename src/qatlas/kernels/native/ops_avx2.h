// AVX2 and FMA: eight lanes. vpmaddubsw saturates its sums of two products at 16 bits, so codes are held to 15 (15 * 128 * 2 = 3840): WIDE is false.
#pragma once
#include <immintrin.h>
#include <stdint.h>

struct Ops {
    static constexpr int N = 8;
    static constexpr bool WIDE = false;
    typedef __m256i I;
    typedef __m256 F;
    static inline I row(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static inline void turn(const uint8_t* const* rows, int64_t at, I* out) {
        I a[8], b[8];
        for (int r = 0; r < 8; r++) a[r] = row(rows[r] + at);
        for (int r = 0; r < 8; r += 2) {
            b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
        }
        for (int r = 0; r < 8; r += 4)
            for (int h = 0; h < 2; h++) {
                a[r + 2 * h] = _mm256_unpacklo_epi64(b[r + h], b[r + h + 2]);
                a[r + 2 * h + 1] = _mm256_unpackhi_epi64(b[r + h], b[r + h + 2]);
            }
        for (int j = 0; j < 4; j++) {
            out[j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
            out[4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
        }
    }
    static inline I zero() { return _mm256_setzero_si256(); }
    static inline I all(int32_t v) { return _mm256_set1_epi32(v); }
    static inline I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static inline void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static inline I both(I a, I b) { return _mm256_and_si256(a, b); }
    static inline I either(I a, I b) { return _mm256_or_si256(a, b); }
    static inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
    template <int S> static inline I right(I a) { return _mm256_srli_epi32(a, S); }
    template <int S> static inline I signed_right(I a) { return _mm256_srai_epi32(a, S); }
    template <int S> static inline I left(I a) { return _mm256_slli_epi32(a, S); }
    static inline I dp(I acc, I codes, const int32_t* x) {
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, _mm256_set1_epi32(*x)), _mm256_set1_epi16(1)));
    }
    template <int S> static inline I three(I a) {
        a = right<S>(a);
        return either(either(both(a, all(7)), left<5>(both(a, all(0x38)))), either(left<10>(both(a, all(0x1c0))), left<15>(both(a, all(0xe00)))));
    }
    static inline I digit(I a) {
        const I minus = _mm256_add_epi8(_mm256_cmpgt_epi8(a, _mm256_set1_epi8(-43)), _mm256_cmpgt_epi8(a, _mm256_set1_epi8(42)));
        return _mm256_sub_epi8(zero(), minus);
    }
    static inline I rest(I a) { return _mm256_add_epi8(a, _mm256_add_epi8(a, a)); }
    static inline F nought() { return _mm256_setzero_ps(); }
    static inline F every(float v) { return _mm256_set1_ps(v); }
    static inline F get(const float* p) { return _mm256_loadu_ps(p); }
    static inline void put(float* p, F v) { _mm256_storeu_ps(p, v); }
    static inline F number(I a) { return _mm256_cvtepi32_ps(a); }
    static inline F plus(F a, F b) { return _mm256_add_ps(a, b); }
    static inline F minus(F a, F b) { return _mm256_sub_ps(a, b); }
    static inline F times(F a, F b) { return _mm256_mul_ps(a, b); }
    static inline F fused(F acc, F v, const float* x) { return _mm256_fmadd_ps(v, _mm256_set1_ps(*x), acc); }
    template <int B> static inline F look(const float* table, I a) {
        const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), a);
        if (B < 4) return low;
        return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), a), _mm256_castsi256_ps(left<28>(a)));
    }
    template <int H> static inline F cross(F a) {
        const F other = H == 1 ? _mm256_permute_ps(a, 0xb1) : H == 2 ? _mm256_permute_ps(a, 0x4e) : _mm256_permute2f128_ps(a, a, 1);
        return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), H == 1 ? 0xaa : H == 2 ? 0xcc : 0xf0);
    }
    static inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};
