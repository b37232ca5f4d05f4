// The two products, for a tile of N rows. Included once by each variant.
//
// A lane is a row. N rows by N dwords of codes are loaded as they lie and turned, so that each vector holds one dword of every row; from then on
// there is nothing across lanes: groups end where they end, sums need no folding, and each x is the same for all lanes (a broadcast from memory).
// Turning costs 4 instructions a vector and is paid once for all tokens and all codes of a dword.
#pragma once

namespace product {

// left for later
static void linear(const QnJob&, int64_t) {}
static void linear_int8(const QnJob&, int64_t) {}

}  // namespace product
