// The variant of 64-bit Arm, all of which have NEON. `sdot` is used where the compiler is told that the machine has it.
#include "variant.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

namespace {
#include "ops_neon.h"

#include "hadamard.h"
#include "unpack.h"

#include "product.h"
bool runs() { return true; }
const QnVariant variant = {"neon", Ops::N, runs, product::linear, product::linear_int8, hadamard::run};
}  // namespace

const QnVariant* qn_neon() { return &variant; }
#else
const QnVariant* qn_neon() { return nullptr; }
#endif
