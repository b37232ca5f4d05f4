// The C++ core against plain loops, over random shapes, with buffers that end where their contents end: what a sanitizer is run over.
// Arguments: seed, how many cases, threads that call at once. Says "ok CASES VARIANTS" and exits with 0, or names the first difference.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "native.h"
#include "variant.h"

#if defined(__x86_64__)           // variants that this build leaves out, since they are made of the same lines
const QnVariant* qn_avx512() { return nullptr; }
const QnVariant* qn_vnni() { return nullptr; }
const QnVariant* qn_neon() { return nullptr; }
#else
const QnVariant* qn_avx2() { return nullptr; }
const QnVariant* qn_avx512() { return nullptr; }
const QnVariant* qn_vnni() { return nullptr; }
const QnVariant* qn_vbmi() { return nullptr; }
#endif

template <class T> struct Exactly {        // memory of exactly n elements, so that a step beyond is seen
    T* at;
    explicit Exactly(size_t n) : at(static_cast<T*>(std::malloc(n * sizeof(T) ? n * sizeof(T) : 1))) {}
    Exactly(const Exactly&) = delete;
    ~Exactly() { std::free(at); }
};

static int one(uint64_t seed) {
    std::mt19937_64 random(seed);
    const auto pick = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1)); };
    const int widths[] = {1, 2, 3, 4, 8, 16}, width = widths[pick(0, 5)];
    const int64_t unit = width == 3 ? 32 : width == 16 ? 5 : 32 / width;
    const bool grouped = pick(0, 1);
    const int64_t rows = pick(1, 40), group = grouped ? unit * pick(1, 9) : pick(1, 300), groups = grouped ? pick(1, 5) : 1, cols = group * groups;
    const int64_t tokens = pick(1, 19), dwords = (group + 19) / 20;
    const int64_t stride = width == 16 ? 4 * dwords * groups : (cols * width + 7) / 8;
    Exactly<uint8_t> codes(static_cast<size_t>(rows * stride));
    Exactly<int8_t> x(static_cast<size_t>(tokens * cols));
    Exactly<float> fx(static_cast<size_t>(tokens * cols)), y(static_cast<size_t>(tokens * rows)), fy(static_cast<size_t>(tokens * rows));
    Exactly<float> scale(static_cast<size_t>(rows * groups)), zero(static_cast<size_t>(rows * groups)), step(static_cast<size_t>(tokens));
    Exactly<float> table(16), bias(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows * stride; i++) codes.at[i] = static_cast<uint8_t>(random());
    std::vector<int> c(static_cast<size_t>(rows * cols));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < cols; k++) {
            int& code = c[static_cast<size_t>(r * cols + k)];
            if (width == 16) {
                uint8_t f = static_cast<uint8_t>(codes.at[r * stride + k / group * 4 * dwords + k % group / 5] + 128);
                for (int64_t i = 0; i < k % group % 5; i++) f = static_cast<uint8_t>(3 * f);
                code = 3 * f >> 8;
            } else {
                code = 0;
                for (int b = 0; b < width; b++)
                    code |= (codes.at[r * stride + (k * width + b) / 8] >> ((k * width + b) % 8) & 1) << b;
            }
        }
    const bool ends = pick(0, 3) == 0, zeros = pick(0, 1), bent = pick(0, 1);
    for (int64_t i = 0; i < tokens * cols; i++) {
        x.at[i] = static_cast<int8_t>(ends ? -128 : pick(-128, 127));
        fx.at[i] = x.at[i];
    }
    for (int64_t i = 0; i < rows * groups; i++) scale.at[i] = static_cast<float>(pick(1, 64)) / 64, zero.at[i] = static_cast<float>(pick(0, 15));
    for (int64_t i = 0; i < tokens; i++) step.at[i] = 0.5f;
    for (int64_t i = 0; i < rows; i++) bias.at[i] = static_cast<float>(pick(-9, 9));
    const int shift = static_cast<int>(pick(0, 1)), whole = static_cast<int>(pick(-128, 0));
    for (int i = 0; i < 16; i++) table.at[i] = static_cast<float>(((width == 16 ? i : i & ((1 << (width < 4 ? width : 4)) - 1)) << shift) + whole);
    const QnMatrix w{codes.at, stride, rows, cols, group, groups, width, shift, whole, 1.0f, static_cast<float>(1 << shift),
                     static_cast<float>(whole), table.at, scale.at, zeros ? zero.at : nullptr, nullptr, groups, 1};
    const int32_t threads = static_cast<int32_t>(pick(1, 3));
    qn_linear_int8(&w, x.at, tokens, step.at, nullptr, nullptr, bent ? bias.at : nullptr, y.at, threads);
    qn_linear(&w, fx.at, tokens, bent ? bias.at : nullptr, fy.at, threads);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) {
            float total = 0;
            double wide = 0, size = 1;
            for (int64_t g = 0; g < groups; g++) {
                int64_t d = 0, sum = 0;
                for (int64_t k = g * group; k < (g + 1) * group; k++) {
                    const int64_t q = x.at[t * cols + k], v = (static_cast<int64_t>(c[static_cast<size_t>(r * cols + k)]) << shift) + whole;
                    d += v * q, sum += q, size += std::fabs(static_cast<double>(q)) * (std::fabs(static_cast<double>(v)) + 16);
                }
                float part = static_cast<float>(static_cast<int32_t>(d));
                if (zeros) part = part - zero.at[r * groups + g] * static_cast<float>(sum);
                total = total + scale.at[r * groups + g] * part;
                wide += static_cast<double>(scale.at[r * groups + g]) * (static_cast<double>(d) - (zeros ? zero.at[r * groups + g] : 0) * static_cast<double>(sum));
            }
            float want = 0.5f * total;
            if (bent) want = want + bias.at[r], wide += bias.at[r];
            if (y.at[t * rows + r] != want || std::fabs(fy.at[t * rows + r] - wide) > size * 1e-6 * static_cast<double>(cols + 16) / 16) {
                std::printf("%s: seed %llu width %d rows %lld cols %lld group %lld tokens %lld: %g %g, want %g\n", qn_variant(),
                            static_cast<unsigned long long>(seed), width, static_cast<long long>(rows), static_cast<long long>(cols),
                            static_cast<long long>(group), static_cast<long long>(tokens), y.at[t * rows + r], fy.at[t * rows + r], want);
                return 1;
            }
        }
    const int64_t n = int64_t{1} << pick(0, 12), blocks = pick(1, n > 256 ? 3 : 40);
    Exactly<float> h(static_cast<size_t>(blocks * n)), back(static_cast<size_t>(blocks * n));
    for (int64_t i = 0; i < blocks * n; i++) h.at[i] = static_cast<float>(pick(-100, 100));
    qn_hadamard(h.at, back.at, blocks, n, 1.0f, threads);
    qn_hadamard(back.at, back.at, blocks, n, 1.0f / static_cast<float>(n), threads);
    if (std::memcmp(h.at, back.at, static_cast<size_t>(blocks * n) * 4)) return std::printf("hadamard of %lld\n", static_cast<long long>(n)), 1;
    const int64_t wide = pick(1, 300), many = pick(0, 70);
    Exactly<float> full(static_cast<size_t>(many * wide)), pace(static_cast<size_t>(many));
    Exactly<int8_t> code(static_cast<size_t>(many * wide));
    for (int64_t i = 0; i < many * wide; i++) full.at[i] = pick(0, 2000) ? static_cast<float>(pick(-1000, 1000)) / 64 : HUGE_VALF;
    qn_tokens(full.at, many, wide, 127.0f, 1e-38f, -128.0f, 127.0f, code.at, pace.at, threads);
    for (int64_t i = 0; i < many * wide; i++)
        if (std::fabs(full.at[i] - pace.at[i / wide] * code.at[i]) > pace.at[i / wide] * 0.50001f) return std::printf("tokens of %lld\n", static_cast<long long>(wide)), 1;
    return 0;
}

int main(int, char** argv) {
    const uint64_t seed = static_cast<uint64_t>(std::atoll(argv[1]));
    const int cases = std::atoi(argv[2]), callers = std::atoi(argv[3]);
    const char* names[16];
    const int32_t variants = qn_variants(names, 16);
    for (int32_t v = 0; v < variants; v++) {
        qn_choose(names[v]);
        std::vector<int> failed(static_cast<size_t>(callers), 0);
        const auto call = [&](int who) {
            for (int i = 0; i < cases; i++) failed[static_cast<size_t>(who)] |= one(seed + static_cast<uint64_t>(1000 * who + i));
        };
        std::vector<std::thread> others;
        for (int who = 1; who < callers; who++) others.emplace_back(call, who);
        call(0);
        for (std::thread& other : others) other.join();
        for (int f : failed)
            if (f) return 1;
    }
    std::printf("ok %d", cases);
    for (int32_t v = 0; v < variants; v++) std::printf(" %s", names[v]);
    std::printf("\n");
    return 0;
}
