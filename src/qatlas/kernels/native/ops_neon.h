// NEON of 64-bit Arm: four lanes. Bytes are multiplied by `sdot` where the compiler is told that the machine has it, else by widening products; both
// are signed, so codes are held to 127, and WIDE is false (8-bit codes go as two halves of 4 bits).
#pragma once
#include <arm_neon.h>
#include <stdint.h>

struct Ops {
    static constexpr int N = 4;
    static constexpr bool WIDE = false;
    typedef uint32x4_t I;
    typedef float32x4_t F;
    static inline void turn(const uint8_t* const* rows, int64_t at, I* out) {
        I a[4];
        for (int r = 0; r < 4; r++) a[r] = vreinterpretq_u32_u8(vld1q_u8(rows[r] + at));
        const I b0 = vtrn1q_u32(a[0], a[1]), b1 = vtrn2q_u32(a[0], a[1]), b2 = vtrn1q_u32(a[2], a[3]), b3 = vtrn2q_u32(a[2], a[3]);
        out[0] = wide(vtrn1q_u64(narrow(b0), narrow(b2))), out[1] = wide(vtrn1q_u64(narrow(b1), narrow(b3)));
        out[2] = wide(vtrn2q_u64(narrow(b0), narrow(b2))), out[3] = wide(vtrn2q_u64(narrow(b1), narrow(b3)));
    }
    static inline uint64x2_t narrow(I a) { return vreinterpretq_u64_u32(a); }
    static inline I wide(uint64x2_t a) { return vreinterpretq_u32_u64(a); }
    static inline uint8x16_t bytes(I a) { return vreinterpretq_u8_u32(a); }
    static inline I words(uint8x16_t a) { return vreinterpretq_u32_u8(a); }
    static inline I zero() { return vdupq_n_u32(0); }
    static inline I all(int32_t v) { return vdupq_n_u32(static_cast<uint32_t>(v)); }
    static inline I load(const int32_t* p) { return vreinterpretq_u32_s32(vld1q_s32(p)); }
    static inline void store(int32_t* p, I v) { vst1q_s32(p, vreinterpretq_s32_u32(v)); }
    static inline I both(I a, I b) { return vandq_u32(a, b); }
    static inline I either(I a, I b) { return vorrq_u32(a, b); }
    static inline I add(I a, I b) { return vaddq_u32(a, b); }
    template <int S> static inline I right(I a) { if constexpr (S == 0) return a; else return vshrq_n_u32(a, S); }
    template <int S> static inline I signed_right(I a) {
        if constexpr (S == 0) return a;
        else return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), S));
    }
    template <int S> static inline I left(I a) { return vshlq_n_u32(a, S); }
    static inline I dp(I acc, I codes, const int32_t* x) {
        const int8x16_t c = vreinterpretq_s8_u32(codes), q = vreinterpretq_s8_s32(vdupq_n_s32(*x));
        const int32x4_t a = vreinterpretq_s32_u32(acc);
#if defined(__ARM_FEATURE_DOTPROD)
        return vreinterpretq_u32_s32(vdotq_s32(a, c, q));
#else
        const int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(q)), high = vmull_high_s8(c, q);
        return vreinterpretq_u32_s32(vaddq_s32(a, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
#endif
    }
    template <int S> static inline I three(I a) {
        a = right<S>(a);
        return either(either(both(a, all(7)), left<5>(both(a, all(0x38)))), either(left<10>(both(a, all(0x1c0))), left<15>(both(a, all(0xe00)))));
    }
    static inline I digit(I a) {
        const int8x16_t b = vreinterpretq_s8_u32(a);
        const uint8x16_t minus = vaddq_u8(vcgtq_s8(b, vdupq_n_s8(-43)), vcgtq_s8(b, vdupq_n_s8(42)));
        return words(vsubq_u8(vdupq_n_u8(0), minus));
    }
    static inline I rest(I a) { return words(vaddq_u8(bytes(a), vaddq_u8(bytes(a), bytes(a)))); }
    static inline F nought() { return vdupq_n_f32(0); }
    static inline F every(float v) { return vdupq_n_f32(v); }
    static inline F get(const float* p) { return vld1q_f32(p); }
    static inline void put(float* p, F v) { vst1q_f32(p, v); }
    static inline F number(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
    static inline F plus(F a, F b) { return vaddq_f32(a, b); }
    static inline F minus(F a, F b) { return vsubq_f32(a, b); }
    static inline F times(F a, F b) { return vmulq_f32(a, b); }
    static inline F fused(F acc, F v, const float* x) { return vfmaq_n_f32(acc, v, *x); }
    template <int B> static inline F look(const float* table, I a) {        // 16 floats are 64 bytes: four bytes of the table a lane
        const uint8_t* t = reinterpret_cast<const uint8_t*>(table);
        const uint8x16x4_t all64 = {{vld1q_u8(t), vld1q_u8(t + 16), vld1q_u8(t + 32), vld1q_u8(t + 48)}};
        const I at = vmlaq_n_u32(all(0x03020100), both(a, all(15)), 0x04040404u);
        return vreinterpretq_f32_u8(vqtbl4q_u8(all64, bytes(at)));
    }
    template <int H> static inline F cross(F a) {
        const F other = H == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2);
        const uint32x4_t upper = H == 1 ? uint32x4_t{0, ~0u, 0, ~0u} : uint32x4_t{0, 0, ~0u, ~0u};
        return vbslq_f32(upper, vsubq_f32(other, a), vaddq_f32(a, other));
    }
    static inline void fetch(const void* p) { __builtin_prefetch(p); }
};
