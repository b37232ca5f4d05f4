"""One row of activations times a packed weight: y = sum over groups of S sum (c - Z) x.

Bytes are all that this costs, if the arithmetic hides behind them: a program takes BN rows and goes along the inputs, GB groups of SU words at a
time (a group longer than 16 words goes in parts). Words are read as they lie, consecutive threads consecutive words. Every code costs two integer
operations, a subtraction and a fused multiply-add; S is multiplied once for a part of a group. Sums are fp32.

Where rows are few for the chip (SPLITS > 1), several programs share a row's inputs and each writes its own sum; they are added up in a fixed order,
so that the same call gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lang import jit, launch, power, tl
from .matrix import UNIT, WORD, Packed
from .plan import Plan
from .tile import fetch, looked_up, plane, word


@jit
def gemv(x, codes, scale, zero, table, bias, out, rows, width, words, groups, per, shift, BITS: tl.constexpr, UNIT: tl.constexpr,
         GROUPED: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
         BN: tl.constexpr, GB: tl.constexpr, SU: tl.constexpr):
    """words: in a row. groups: columns of scale. per: parts in a group."""
    start = tl.program_id(0) * BN                                 # far offsets once a program, near ones in 32 bits
    row = start + tl.arange(0, BN)
    near = tl.minimum(tl.arange(0, BN), rows - 1 - start)
    codes += start.to(tl.int64) * words * (BITS if BITS == 3 or (BITS >= 5 and BITS <= 7) else 1)
    scale += start.to(tl.int64) * groups
    if ZERO:
        zero += start.to(tl.int64) * groups
    begin = near[:, None, None] * words
    total = tl.zeros((BN, GB), tl.float32)
    parts = (width + SU * UNIT - 1) // (SU * UNIT)
    for first in range(tl.program_id(1) * GB, parts, GB * SPLITS):
        part = first + tl.arange(0, GB)
        at = part[None, :, None] * SU + tl.arange(0, SU)[None, None, :]        # (1, GB, SU)
        mask = at * UNIT < width
        w = word(codes, begin + at, mask, BITS, EVEN)                 # (BN, GB, SU)
        of = near[:, None] * groups + (part // per)[None, :]
        there = (part < parts)[None, :]
        if ZERO:
            z = fetch(zero + of, there, EVEN).to(tl.float32)
            less = tl.expand_dims(1.0 + z * (1.0 / (1 << BITS)), 2)
        else:
            less = 1.0 + shift * (1.0 / (1 << BITS))
        sums = tl.zeros((BN, GB, SU), tl.float32)
        for i in tl.static_range(UNIT):
            k = at * UNIT + i
            xi = fetch(x + k, k < width, EVEN).to(tl.float32)
            if TABLE:
                sums += looked_up(w, i, table, BITS) * xi
            else:
                sums += (plane(w, i, BITS) - less) * xi
        if GROUPED:
            total += tl.sum(sums, 2) * fetch(scale + of, there, EVEN).to(tl.float32)
        else:
            total += tl.sum(sums, 2)
    y = tl.sum(total, 1)
    if not TABLE:
        y *= 1 << BITS
    if not GROUPED:
        y *= tl.load(scale + near).to(tl.float32)
    if BIAS:
        y += tl.load(bias + start + near).to(tl.float32)
    tl.store(out + tl.program_id(1) * rows + row, y.to(out.dtype.element_ty), mask=row < rows)


def run(x: Tensor, matrix: Packed, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (width,) contiguous -> (rows,) in the type of x."""
    unit, bits = UNIT[matrix.bits], matrix.bits
    codes = matrix.codes.view(WORD[bits]) if bits in WORD else matrix.codes
    words = codes.shape[1] // (1 if bits in WORD else bits)
    su, per = parts(matrix)
    splits = plan.splits
    out = torch.empty((splits, matrix.rows), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    even = matrix.width % (plan.gb * su * unit) == 0
    grid = (-(-matrix.rows // plan.bn), splits)
    launch(gemv, grid, x, codes, matrix.scale, matrix.zero, matrix.table, bias if splits == 1 else None, out, matrix.rows, matrix.width, words,
           matrix.scale.shape[1], per, float(matrix.shift), warps=plan.warps, stages=plan.stages, BITS=bits, UNIT=unit, GROUPED=matrix.grouped,
           ZERO=matrix.zero is not None, TABLE=matrix.table is not None, BIAS=bias is not None and splits == 1, EVEN=even, SPLITS=splits,
           BN=plan.bn, GB=plan.gb, SU=su)
    if splits == 1:
        return out[0]
    y = out.sum(0)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def parts(matrix: Packed) -> tuple[int, int]:
    """Words of a part of a group, and parts in a group."""
    unit = UNIT[matrix.bits]
    if not matrix.grouped:
        return min(16, power(-(-max(matrix.width, 1) // unit))), 1 << 30
    words = matrix.group // unit
    su = min(words & -words, 16)
    return su, words // su
