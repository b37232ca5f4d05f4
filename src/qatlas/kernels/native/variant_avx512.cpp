// The variant of machines with AVX-512 as it began (Skylake-SP).
#include "variant.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace {
#include "ops_avx512.h"

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
bool runs() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }
const QnVariant variant = {"avx512", Ops::N, runs, product::linear, product::linear_int8, hadamard::run};
}  // namespace

const QnVariant* qn_avx512() { return &variant; }
#else
const QnVariant* qn_avx512() { return nullptr; }
#endif
