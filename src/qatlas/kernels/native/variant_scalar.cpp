// The variant that any machine runs.
#include "variant.h"

#include <string.h>

namespace {
#include "ops_scalar.h"

#include "hadamard.h"
#include "unpack.h"

#include "product.h"
bool runs() { return true; }
const QnVariant variant = {"scalar", Ops::N, runs, product::linear, product::linear_int8, hadamard::run};
}  // namespace

const QnVariant* qn_scalar() { return &variant; }
