// The variant of machines with AVX2 and FMA.
#include "variant.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace {
#include "ops_avx2.h"

#include "hadamard.h"
#include "unpack.h"

#include "product.h"
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {
bool runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
const QnVariant variant = {"avx2", Ops::N, runs, product::linear, product::linear_int8, hadamard::run};
}  // namespace

const QnVariant* qn_avx2() { return &variant; }
#else
const QnVariant* qn_avx2() { return nullptr; }
#endif
