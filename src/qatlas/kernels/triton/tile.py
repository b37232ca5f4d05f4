"""How codes leave their bytes, inside a kernel.

Two ways, for two kinds of product:

    word, plane     a word of 8 codes (4 of 8 bits) stays in its register, and code i of all words is taken at once: no code ever moves to another
                    thread. The activations are read in the same order. For one row of activations, summed up by plain arithmetic
    codes           a tile (rows, inputs) in the order of the inputs, as the tensor cores want it

A code becomes a number without a conversion: its bits are put at the top of the mantissa of 1.0, which gives 1 + code / 2^bits exactly; what is
subtracted afterwards is exact as well. (An int-to-float conversion has a quarter of the throughput of the arithmetic around it.)
"""

from __future__ import annotations

from .lang import jit, tl


@jit
def fetch(ptr, mask, EVEN: tl.constexpr):
    """What lies there; 0 outside of the mask, which an EVEN tile does not need."""
    if EVEN:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@jit
def word(codes, at, mask, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Word `at` of the codes: so many bits times 8 (8 bits: 4 codes), in int32, or int64 where 5 to 7 bits need it."""
    if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        out = fetch(codes + at, mask, EVEN).to(tl.int32)
    else:
        first = codes + at * BITS
        out = fetch(first, mask, EVEN).to(tl.int32 if BITS == 3 else tl.int64)
        for i in tl.static_range(1, BITS):
            out |= fetch(first + i, mask, EVEN).to(out.dtype) << (8 * i)
    return out


@jit
def plane(words, i: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2^bits of code i of each word, fp32."""
    AT: tl.constexpr = i * BITS
    UP: tl.constexpr = 23 - BITS
    if BITS >= 5 and BITS <= 7:
        raised = ((words >> AT) & ((1 << BITS) - 1)).to(tl.int32) << UP
    elif AT <= UP:
        raised = words << (UP - AT)
    else:
        raised = words >> (AT - UP)
    return ((raised & (((1 << BITS) - 1) << UP)) | 0x3F800000).to(tl.float32, bitcast=True)


@jit
def looked_up(words, i: tl.constexpr, table, BITS: tl.constexpr):
    """The table's value of code i of each word."""
    return tl.load(table + ((words >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.int32))


@jit
def codes(ptr, rows, first, stride, width, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BN, BK) codes, int32, of inputs first .. first + BK, a multiple of 8. rows (BN,) int64; stride: bytes of a row. Beyond the row: 0."""
    if BITS == 8:
        k = first + tl.arange(0, BK)
        out = tl.load(ptr + rows[:, None] * stride + k[None, :], mask=(k < width)[None, :], other=0).to(tl.int32)
    elif BITS == 1 or BITS == 2 or BITS == 4:
        EACH: tl.constexpr = 8 // BITS
        at = first // EACH + tl.arange(0, BK // EACH)
        byte = tl.load(ptr + rows[:, None] * stride + at[None, :], mask=(at * EACH < width)[None, :], other=0).to(tl.int32)
        shifts = tl.arange(0, EACH) * BITS
        out = tl.reshape((byte[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1), (BN, BK))
    else:                                                         # elements straddle bytes: two bytes of each, most of them met before
        bit = (first + tl.arange(0, BK)) * BITS
        at = bit // 8
        here = rows[:, None] * stride + at[None, :]
        last = (width * BITS + 7) // 8
        low = tl.load(ptr + here, mask=(at < last)[None, :], other=0).to(tl.int32)
        high = tl.load(ptr + here + 1, mask=(at + 1 < last)[None, :], other=0).to(tl.int32)
        out = ((low | (high << 8)) >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
    return out


@jit
def number(c, BITS: tl.constexpr):
    """1 + code / 2^bits, fp32."""
    return ((c << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
