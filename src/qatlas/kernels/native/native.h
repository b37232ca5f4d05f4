// The C interface of the CPU kernels: products with packed weights, and the Walsh-Hadamard transform.
//
// A weight W (rows, cols) is used in place, in the layout of core/qtensor.pack_bits: dense, least significant bit first along a row, each row padded
// to a whole byte. W = s (v - z), or s v + m, with v from a code c by whole numbers or by a table. One scale serves a group of a row's columns.
//
//   qn_linear        y = x W^T + b, x fp32                          sums of floats, in an order of our own
//   qn_linear_int8   y = step (sum_g s_g (D_g - z_g X_g) - zx U) + b, x = step (q - zx), q int8     integers exact, floats in exactly this order
//   qn_hadamard      blocks of a power of two up to 4096, times a factor
//   qn_tokens        activations to whole numbers, one step a token, by the formula of core
//
// All check nothing: the caller (kernels/packed.py) has checked shapes and types. All may be called from several threads at once, and after fork.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define QN_API extern "C" __attribute__((visibility("default")))
#else
#define QN_API extern "C"
#endif

enum QnWidth { QN_1 = 1, QN_2 = 2, QN_3 = 3, QN_4 = 4, QN_8 = 8, QN_TERNARY = 16 };  // QN_TERNARY: five digits of base three a byte

struct QnMatrix {
    const uint8_t* codes;     // (rows, stride) bytes
    int64_t stride;           // bytes from a row to the next
    int64_t rows, cols;
    int64_t group;            // columns that share a scale; of QN_TERNARY each group starts at a multiple of four bytes
    int64_t groups;           // of a row: group * groups == cols
    int32_t width;            // QnWidth
    int32_t shift, whole;     // of qn_linear_int8: v = ((c << shift) + whole) part, shift 0 or 1
    float part;               // a power of two, 1 or less
    float unit, low;          // of qn_linear with 8 bits: v = unit c + low
    const float* table;       // of qn_linear with fewer: 16 values, those of the codes again and again
    const float* scale;       // (rows, groups) with these strides, in floats; a stride may be 0
    const float* zero;        // as scale, or null
    const float* offset;      // as scale, or null
    int64_t by_row, by_group;
};

QN_API void qn_linear(const QnMatrix* w, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads);
QN_API void qn_linear_int8(const QnMatrix* w, const int8_t* x, int64_t tokens, const float* step, const float* zero, const float* sums,
                           const float* bias, float* y, int32_t threads);  // zero and sums (rows,): both, or null; sums are U: y of one token of ones with step 1
QN_API void qn_hadamard(const float* x, float* y, int64_t blocks, int64_t n, float factor, int32_t threads);  // y may be x
QN_API void qn_tokens(const float* x, int64_t tokens, int64_t cols, float reach, float floor, float low, float high, int8_t* codes, float* steps,
                      int32_t threads);                        // codes (tokens, cols); steps (tokens,)
QN_API int32_t qn_variants(const char** names, int32_t most);  // names of those this machine runs, the slowest first; how many
QN_API const char* qn_variant(void);                           // the one in use
QN_API int32_t qn_choose(const char* name);                    // 1: taken; 0: this machine does not run it
