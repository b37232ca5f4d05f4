"""Rows of activations times a packed weight, on tensor cores: a tile of codes becomes numbers of the activations' type and is multiplied.

    y^T = w x^T    (BN, BM), summed in fp32

The weight stands on the left: there, on Hopper, an operand may come from registers, and what is unpacked need not go through shared memory again.
With one step a row, S is applied to the sum, and c - Z is exact in fp16 and in bf16. With several, w = S (c - Z) is rounded to the activations'
type, as the weight of a half-precision model is. Activations in fp32 are multiplied in fp32.

Steps of groups are read once a tile: a tile lies in one group, or holds whole groups of a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lang import INTERPRETED, jit, launch, tl
from .matrix import Packed
from .plan import Plan
from .tile import codes as unpacked
from .tile import number


@jit
def weights(c, scale, zero, table, near, first, groups, group, shift, BITS: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr):
    """(BN, BK) of fp32: c - Z where a row has one step, else S (c - Z). SPAN: groups in a tile, 0: one step a row."""
    if TABLE:
        value = tl.load(table + c)
    else:
        value = number(c, BITS)                                   # 1 + c / 2^bits
    MANY: tl.constexpr = SPAN if SPAN > 0 else 1
    value = tl.reshape(value, (BN, MANY, BK // MANY))
    of = near[:, None] * groups
    if SPAN > 0:
        of += (first // group + tl.arange(0, MANY))[None, :]
    there = of < (near[:, None] + 1) * groups
    if not TABLE:
        if ZERO:
            z = tl.load(zero + of, mask=there, other=0.0).to(tl.float32)
            value -= tl.expand_dims(1.0 + z * (1.0 / (1 << BITS)), 2)
        else:
            value -= 1.0 + shift * (1.0 / (1 << BITS))
        value *= 1 << BITS
    if SPAN > 0:
        value *= tl.expand_dims(tl.load(scale + of, mask=there, other=0.0).to(tl.float32), 2)
    return tl.reshape(value, (BN, BK))


@jit
def gemm(x, codes, scale, zero, table, bias, out, batch, rows, width, stride, groups, group, shift, BITS: tl.constexpr, SPAN: tl.constexpr,
         ZERO: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
         BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """x (batch, width) contiguous; stride: bytes of a row of codes; out (SPLITS, batch, rows)."""
    start = tl.program_id(0) * BN                                 # far offsets once a program, near ones in 32 bits
    row = start + tl.arange(0, BN)
    near = tl.minimum(tl.arange(0, BN), rows - 1 - start)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    x += (tl.program_id(1) * BM).to(tl.int64) * width
    from_x = tl.minimum(tl.arange(0, BM), batch - 1 - tl.program_id(1) * BM)[None, :] * width
    codes += start.to(tl.int64) * stride
    scale += start.to(tl.int64) * groups
    if ZERO:
        zero += start.to(tl.int64) * groups
    total = tl.zeros((BN, BM), tl.float32)
    for first in range(tl.program_id(2) * BK, width, BK * SPLITS):
        k = first + tl.arange(0, BK)
        xt = tl.load(x + from_x + k[:, None], mask=(k < width)[:, None], other=0.0)              # (BK, BM)
        c = unpacked(codes, near, first, stride, width, BITS, BN, BK)
        w = weights(c, scale, zero, table, near, first, groups, group, shift, BITS, SPAN, ZERO, TABLE, BN, BK)
        w = w.to(xt.dtype)
        if WIDE:                                                  # the interpreter multiplies no bf16; the numbers are the same
            total = tl.dot(w.to(tl.float32), xt.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(w, xt, total, input_precision=PRECISION)
    if SPAN == 0:
        total *= tl.load(scale + near).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + start + near).to(tl.float32)[:, None]
    at = (tl.program_id(2) * batch + token).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (token < batch)[None, :])


def run(x: Tensor, matrix: Packed, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (batch, width) contiguous -> (batch, rows) in the type of x."""
    batch, bk = len(x), min(plan.bk, widest(matrix))
    splits = plan.splits
    out = torch.empty((splits, batch, matrix.rows), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    grid = (-(-matrix.rows // plan.bn), -(-batch // plan.bm), splits)
    launch(gemm, grid, x, matrix.codes, matrix.scale, matrix.zero, matrix.table, bias if splits == 1 else None, out, batch, matrix.rows, matrix.width,
           matrix.codes.shape[1], matrix.scale.shape[1], matrix.group, float(matrix.shift), warps=plan.warps, stages=plan.stages, BITS=matrix.bits,
           SPAN=max(bk // matrix.group, 1) if matrix.grouped else 0, ZERO=matrix.zero is not None, TABLE=matrix.table is not None,
           BIAS=bias is not None and splits == 1, SPLITS=splits, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
           WIDE=INTERPRETED and x.dtype == torch.bfloat16, BN=plan.bn, BM=plan.bm, BK=bk)
    if splits == 1:
        return out[0]
    y = out.sum(0)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def widest(matrix: Packed) -> int:
    """The most inputs that a tile may hold."""
    if not matrix.grouped or matrix.group & (matrix.group - 1) == 0:
        return 128
    return min(matrix.group & -matrix.group, 128)
