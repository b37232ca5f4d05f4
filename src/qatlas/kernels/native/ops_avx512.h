// AVX-512 (F, BW, DQ, VL): sixteen lanes. With QN_VNNI bytes are multiplied by vpdpbusd, with QN_VBMI 3-bit codes are spread by vpmultishiftqb.
#pragma once
#include <immintrin.h>
#include <stdint.h>

struct Ops {
    static constexpr int N = 16;
#if defined(QN_VNNI)
    static constexpr bool WIDE = true;
#else
    static constexpr bool WIDE = false;
#endif
    typedef __m512i I;
    typedef __m512 F;
    static inline void turn(const uint8_t* const* rows, int64_t at, I* out) {
        I a[16], b[16];
        for (int r = 0; r < 16; r++) a[r] = _mm512_loadu_si512(rows[r] + at);
        for (int r = 0; r < 16; r += 2) {
            b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        }
        for (int r = 0; r < 16; r += 4)
            for (int h = 0; h < 2; h++) {
                a[r + 2 * h] = _mm512_unpacklo_epi64(b[r + h], b[r + h + 2]);
                a[r + 2 * h + 1] = _mm512_unpackhi_epi64(b[r + h], b[r + h + 2]);
            }                                           // a[r + j]: in each quarter q, dword 4 q + j of rows r .. r + 3
        for (int j = 0; j < 4; j++) {
            b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
            b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
            b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
            b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        }
        for (int j = 0; j < 4; j++) {
            out[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
            out[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
            out[4 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88);
            out[12 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd);
        }
    }
    static inline I zero() { return _mm512_setzero_si512(); }
    static inline I all(int32_t v) { return _mm512_set1_epi32(v); }
    static inline I load(const int32_t* p) { return _mm512_loadu_si512(p); }
    static inline void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static inline I both(I a, I b) { return _mm512_and_si512(a, b); }
    static inline I either(I a, I b) { return _mm512_or_si512(a, b); }
    static inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
    template <int S> static inline I right(I a) { return _mm512_srli_epi32(a, S); }
    template <int S> static inline I signed_right(I a) { return _mm512_srai_epi32(a, S); }
    template <int S> static inline I left(I a) { return _mm512_slli_epi32(a, S); }
    static inline I dp(I acc, I codes, const int32_t* x) {
#if defined(QN_VNNI)
        return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(*x));
#else
        return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, _mm512_set1_epi32(*x)), _mm512_set1_epi16(1)));
#endif
    }
    template <int S> static inline I three(I a) {
#if defined(QN_VBMI)
        const long long low = S | (S + 3) << 8 | (S + 6) << 16 | (S + 9) << 24;
        return both(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(low | (low + 0x20202020) << 32), a), all(0x07070707));
#else
        a = right<S>(a);
        return either(either(both(a, all(7)), left<5>(both(a, all(0x38)))), either(left<10>(both(a, all(0x1c0))), left<15>(both(a, all(0xe00)))));
#endif
    }
    static inline I digit(I a) {
        const I one = _mm512_maskz_set1_epi8(_mm512_cmpgt_epi8_mask(a, _mm512_set1_epi8(-43)), 1);
        return _mm512_mask_blend_epi8(_mm512_cmpgt_epi8_mask(a, _mm512_set1_epi8(42)), one, _mm512_set1_epi8(2));
    }
    static inline I rest(I a) { return _mm512_add_epi8(a, _mm512_add_epi8(a, a)); }
    static inline F nought() { return _mm512_setzero_ps(); }
    static inline F every(float v) { return _mm512_set1_ps(v); }
    static inline F get(const float* p) { return _mm512_loadu_ps(p); }
    static inline void put(float* p, F v) { _mm512_storeu_ps(p, v); }
    static inline F number(I a) { return _mm512_cvtepi32_ps(a); }
    static inline F plus(F a, F b) { return _mm512_add_ps(a, b); }
    static inline F minus(F a, F b) { return _mm512_sub_ps(a, b); }
    static inline F times(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline F fused(F acc, F v, const float* x) { return _mm512_fmadd_ps(v, _mm512_set1_ps(*x), acc); }
    template <int B> static inline F look(const float* table, I a) { return _mm512_permutexvar_ps(a, _mm512_loadu_ps(table)); }
    template <int H> static inline F cross(F a) {
        const F other = H == 1   ? _mm512_permute_ps(a, 0xb1)
                        : H == 2 ? _mm512_permute_ps(a, 0x4e)
                        : H == 4 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                                 : _mm512_shuffle_f32x4(a, a, 0x4e);
        const __mmask16 upper = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
        return _mm512_mask_sub_ps(_mm512_add_ps(a, other), upper, other, a);
    }
    static inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};
