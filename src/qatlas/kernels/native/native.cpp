// The entry points: the choice of a variant, and the work cut into pieces for threads.
#include "native.h"

#include <atomic>
#include <cstring>

#include "pool.h"
#include "variant.h"

namespace {

typedef const QnVariant* (*Find)();
const Find FINDS[] = {qn_scalar, qn_neon, qn_avx2, qn_avx512, qn_vnni, qn_vbmi};         // the slowest first

std::atomic<const QnVariant*> chosen{nullptr};

}  // namespace

const QnVariant* qn_current() {
    const QnVariant* found = chosen.load();
    if (found != nullptr) return found;
    for (Find find : FINDS)
        if (const QnVariant* one = find())
            if (one->runs()) found = one;
    chosen.store(found);
    return found;
}

namespace {

struct Turn {
    const float* x;
    float* y;
    int64_t blocks, n, portion;
    float factor;
    const QnVariant* variant;
};

void turn(void* what, int64_t number) {
    const Turn& t = *static_cast<const Turn*>(what);
    const int64_t first = number * t.portion, rest = t.blocks - first;
    t.variant->hadamard(t.x + first * t.n, t.y + first * t.n, rest < t.portion ? rest : t.portion, t.n, t.factor);
}

}  // namespace

int32_t qn_variants(const char** names, int32_t most) {
    int32_t count = 0;
    for (Find find : FINDS)
        if (const QnVariant* one = find())
            if (one->runs()) {
                if (count < most) names[count] = one->name;
                count++;
            }
    return count;
}

const char* qn_variant(void) { return qn_current()->name; }

int32_t qn_choose(const char* name) {
    for (Find find : FINDS)
        if (const QnVariant* one = find())
            if (one->runs() && !std::strcmp(one->name, name)) {
                chosen.store(one);
                return 1;
            }
    return 0;
}

void qn_hadamard(const float* x, float* y, int64_t blocks, int64_t n, float factor, int32_t threads) {
    if (blocks <= 0 || n <= 0) return;
    const int64_t portion = n >= 16384 ? 1 : 16384 / n;     // 64 KiB at a time
    Turn t{x, y, blocks, n, portion, factor, qn_current()};
    qn_run(turn, &t, (blocks + portion - 1) / portion, threads);
}
