// Activations to whole numbers, one step a token: step = max(max|x| / reach, floor), code = clamp(round(x / step), low, high), ties to even.
// Operation for operation what core/scale.AbsMax and core/grid.Uniform do in fp32, so the same bits. A token with NaN or an infinity has no step: it
// gets NaN, and codes 0.
#include "native.h"

#include <cstring>
#include <limits>

#include "pool.h"

namespace {

struct Tokens {
    const float* x;
    int8_t* codes;
    float* steps;
    int64_t cols, tokens, portion;
    float reach, floor, low, high;
};

constexpr float BIG = 12582912.0f;                            // 1.5 2^23: adding it and taking it away rounds what is below 2^22, ties to even
constexpr uint32_t SIGN = 0x80000000u, INFINITE = 0x7f800000u;

void one(const Tokens& t, int64_t number) {
    const float* x = t.x + number * t.cols;
    int8_t* codes = t.codes + number * t.cols;
    uint32_t most = 0;                                        // the bits of |x| are in the order of |x|, NaN above all
    for (int64_t i = 0; i < t.cols; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= ~SIGN;
        most = bits > most ? bits : most;
    }
    if (most >= INFINITE) {
        t.steps[number] = std::numeric_limits<float>::quiet_NaN();
        std::memset(codes, 0, t.cols);
        return;
    }
    float largest;
    std::memcpy(&largest, &most, 4);
    const float fresh = largest / t.reach, step = fresh < t.floor ? t.floor : fresh;
    t.steps[number] = step;
    for (int64_t i = 0; i < t.cols; ++i) {
        float u = x[i] / step;                                // |u| is the reach and a little at most
        u = (u + BIG) - BIG;
        u = u < t.low ? t.low : u;
        u = u > t.high ? t.high : u;
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(u));
    }
}

void some(void* what, int64_t number) {
    const Tokens& t = *static_cast<const Tokens*>(what);
    const int64_t first = number * t.portion, end = first + t.portion < t.tokens ? first + t.portion : t.tokens;
    for (int64_t i = first; i < end; ++i) one(t, i);
}

}  // namespace

void qn_tokens(const float* x, int64_t tokens, int64_t cols, float reach, float floor, float low, float high, int8_t* codes, float* steps,
               int32_t threads) {
    if (tokens <= 0) return;
    const int64_t portion = cols >= 16384 ? 1 : 16384 / (cols > 0 ? cols : 1);
    Tokens t{x, codes, steps, cols, tokens, portion, reach, floor, low, high};
    qn_run(some, &t, (tokens + portion - 1) / portion, threads);
}
