// What a variant is: the same loops, compiled for one kind of machine. product.h says what the arguments are.
#pragma once
#include "native.h"

struct QnLayout {                 // how the dwords of a row are read, and what x looks like beside them
    int64_t dwords;               // of a group
    int64_t each;                 // codes of a group, padding included
    int64_t padded;               // codes of a row, padding included
    int64_t bytes;                // of a row that are there
    int32_t mode;                 // float products: 0 scale after a group's sum, 1 each weight exactly as `dequantize` gives it
};

struct QnJob {                    // one product; x is laid out by native.cpp in blocks of tokens
    const QnMatrix* w;
    const QnLayout* layout;
    int64_t tokens;               // at most QN_TOKENS
    const void* x;                // floats, or dwords of four int8: each block (padded / 1 or 4, tokens of the block)
    const int32_t* lowx;          // (groups, tokens): whole X
    const float* sumx;            // (groups, tokens): X
    const float* step;            // (tokens,) of int8 x, else null
    const float* xzero;           // (tokens,) or null
    const float* sums;            // (rows,) or null
    const float* bias;            // (rows,) or null
    float* y;                     // (tokens, rows)
};

constexpr int QN_TOKENS = 64, QN_BLOCK = 8;

struct QnVariant {
    const char* name;
    int lanes;
    bool (*runs)();               // on this machine
    void (*linear)(const QnJob& job, int64_t tile);          // rows tile * lanes to (tile + 1) * lanes
    void (*linear_int8)(const QnJob& job, int64_t tile);
    void (*hadamard)(const float* x, float* y, int64_t blocks, int64_t n, float factor);
};

const QnVariant* qn_scalar();
const QnVariant* qn_avx2();       // null where the library was built for another processor
const QnVariant* qn_avx512();
const QnVariant* qn_vnni();
const QnVariant* qn_vbmi();
const QnVariant* qn_neon();
const QnVariant* qn_current();    // the one in use
