// Activations, laid out once a call as the loops of unpack.h read them; then tiles of rows, shared out to threads. 64 tokens at a time: more go through
// in portions, each of which reads the weight again.
//
// A block of T tokens (8, then 4, 2, 1) lies together: (padded, T) floats, or (padded / 4, T) dwords of four int8 in the order in which a dword of
// codes gives them. A group is padded with zeros to whole dwords (of 3 bits: to three), so what stands in the codes' padding does not matter.
#include <cmath>
#include <cstring>
#include <vector>

#include "native.h"
#include "pool.h"
#include "variant.h"

namespace {

constexpr float TAME = 1e30f;            // sums of more than this could overflow before the scale makes them small: then weight by weight

QnLayout laid(const QnMatrix& w) {
    QnLayout layout{};
    const int64_t unit = w.width == QN_3 ? 32 : w.width == QN_TERNARY ? 20 : 32 / w.width;     // codes of one dword, or of three
    const int64_t units = (w.group + unit - 1) / unit;
    layout.dwords = units * (w.width == QN_3 ? 3 : 1);
    layout.each = units * unit;
    layout.padded = layout.each * w.groups;
    layout.bytes = w.width == QN_TERNARY ? 4 * layout.dwords * w.groups : (w.cols * w.width + 7) / 8;
    return layout;
}

// the code (of a group) that stands in byte b of step s
inline int64_t place(int32_t width, int64_t s, int b) {
    switch (width) {
        case QN_1: return s / 8 * 32 + b * 8 + s % 8;
        case QN_2: return s / 4 * 16 + b * 4 + s % 4;
        case QN_4: return s / 2 * 8 + b * 2 + s % 2;
        case QN_TERNARY: return s / 5 * 20 + b * 5 + s % 5;
        default: return 4 * s + b;
    }
}

int64_t block(int64_t t, int64_t tokens) {
    int64_t b = QN_BLOCK;
    while (b > tokens - t) b /= 2;
    return b;
}

std::vector<int32_t> places(const QnMatrix& w, const QnLayout& layout) {
    std::vector<int32_t> order(static_cast<size_t>(layout.each));
    for (int64_t i = 0; i < layout.each; i++) order[static_cast<size_t>(i)] = static_cast<int32_t>(place(w.width, i / 4, static_cast<int>(i % 4)));
    return order;
}

struct Run {
    QnJob job;
    int64_t tiles, portion;
    bool integers;
    const QnVariant* variant;
};

void tiles(void* what, int64_t number) {
    const Run& run = *static_cast<const Run*>(what);
    const int64_t first = number * run.portion, end = first + run.portion < run.tiles ? first + run.portion : run.tiles;
    for (int64_t tile = first; tile < end; tile++)
        (run.integers ? run.variant->linear_int8 : run.variant->linear)(run.job, tile);
}

void go(const QnJob& job, bool integers, int32_t threads) {
    Run run{job, 0, 1, integers, qn_current()};
    run.tiles = (job.w->rows + run.variant->lanes - 1) / run.variant->lanes;
    const int64_t pieces = threads > 1 ? 8 * static_cast<int64_t>(threads) : 1;
    run.portion = (run.tiles + pieces - 1) / pieces;
    qn_run(tiles, &run, (run.tiles + run.portion - 1) / run.portion, threads);
}

}  // namespace

void qn_linear(const QnMatrix* w, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads) {
    QnLayout layout = laid(*w);
    const bool mixed = w->width == QN_TERNARY, summed = w->zero != nullptr || w->offset != nullptr;
    const std::vector<int32_t> order = mixed ? places(*w, layout) : std::vector<int32_t>();
    const int64_t most = tokens < QN_TOKENS ? tokens : QN_TOKENS;
    std::vector<float> laid_x(static_cast<size_t>(most * layout.padded)), sums(static_cast<size_t>(most * w->groups));
    for (int64_t first = 0; first < tokens; first += QN_TOKENS) {
        const int64_t n = tokens - first < QN_TOKENS ? tokens - first : QN_TOKENS;
        layout.mode = 0;
        for (int64_t t = 0, b; t < n; t += b) {
            b = block(t, n);
            for (int64_t i = 0; i < b; i++) {
                const float* from = x + (first + t + i) * w->cols;
                bool tame = true;
                for (int64_t k = 0; k < w->cols; k++) tame &= std::fabs(from[k]) <= TAME;
                if (!tame) layout.mode = 1;
                for (int64_t g = 0; g < w->groups; g++, from += w->group) {
                    float* to = laid_x.data() + t * layout.padded + g * layout.each * b + i;
                    if (mixed)
                        for (int64_t k = 0; k < layout.each; k++) to[k * b] = order[static_cast<size_t>(k)] < w->group ? from[order[static_cast<size_t>(k)]] : 0;
                    else {
                        for (int64_t k = 0; k < w->group; k++) to[k * b] = from[k];
                        for (int64_t k = w->group; k < layout.each; k++) to[k * b] = 0;
                    }
                    double sum = 0;
                    if (summed)
                        for (int64_t k = 0; k < w->group; k++) sum += static_cast<double>(from[k]);
                    sums[static_cast<size_t>(g * n + t + i)] = static_cast<float>(sum);
                }
            }
        }
        go(QnJob{w, &layout, n, laid_x.data(), nullptr, sums.data(), nullptr, nullptr, nullptr, bias, y + first * w->rows}, false, threads);
    }
}

void qn_linear_int8(const QnMatrix* w, const int8_t* x, int64_t tokens, const float* step, const float* zero, const float* row_sums,
                    const float* bias, float* y, int32_t threads) {
    const QnLayout layout = laid(*w);
    const std::vector<int32_t> order = places(*w, layout);
    const int64_t most = tokens < QN_TOKENS ? tokens : QN_TOKENS;
    std::vector<int32_t> laid_x(static_cast<size_t>(most * layout.padded / 4)), lowx(static_cast<size_t>(most * w->groups));
    std::vector<float> sums(static_cast<size_t>(most * w->groups));
    std::vector<int8_t> group(static_cast<size_t>(layout.each), 0);
    for (int64_t first = 0; first < tokens; first += QN_TOKENS) {
        const int64_t n = tokens - first < QN_TOKENS ? tokens - first : QN_TOKENS;
        for (int64_t t = 0, b; t < n; t += b) {
            b = block(t, n);
            for (int64_t i = 0; i < b; i++)
                for (int64_t g = 0; g < w->groups; g++) {
                    std::memcpy(group.data(), x + (first + t + i) * w->cols + g * w->group, static_cast<size_t>(w->group));
                    int32_t* to = laid_x.data() + t * (layout.padded / 4) + g * (layout.each / 4) * b + i;
                    int32_t sum = 0;
                    for (int64_t k = 0; k < w->group; k++) sum += group[static_cast<size_t>(k)];
                    for (int64_t s = 0; s < layout.each / 4; s++) {
                        int8_t four[4];
                        for (int k = 0; k < 4; k++) four[k] = group[static_cast<size_t>(order[static_cast<size_t>(4 * s + k)])];
                        std::memcpy(to + s * b, four, 4);
                    }
                    lowx[static_cast<size_t>(g * n + t + i)] = w->whole * sum;
                    sums[static_cast<size_t>(g * n + t + i)] = static_cast<float>(sum);
                }
        }
        go(QnJob{w, &layout, n, laid_x.data(), lowx.data(), sums.data(), step + first, zero ? zero + first : nullptr, row_sums, bias,
                 y + first * w->rows}, true, threads);
    }
}
