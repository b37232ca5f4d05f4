"""Integer activations times a packed weight, on the integer tensor cores (int8 x int8 -> int32); and the same for fp8.

The lines are those of kernels/packed.py's `linear_int8` on CPU, and give the same bits: with codes q, a step and a zero a token, whole weights
v = (a c + w) part, and a group's s, z or m,

    D = sum q (a c + w) = a sum q e + (a off + w) X,     X = sum q,     e = c - off in int8        exact in int32, in any order, on any chip
    T = T + s (D part - z X),   or   T + (s D part + m X)            groups one after another, fp32, each product and each sum rounded once
    y = step (T - t U) + bias                                         t the token's zero, U the sum of the weight's row by the line before

"""

from __future__ import annotations

import torch
from torch import Tensor

from .lang import INTERPRETED, jit, launch, tl
from .matrix import Packed
from .plan import Plan
from .tile import codes as unpacked


@jit
def gemm8(x, codes, scale, zero, offset, steps, points, sums, bias, out, batch, rows, width, stride, groups, group, off, rest, part, A: tl.constexpr,
          BITS: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, REST: tl.constexpr, POINTS: tl.constexpr, BIAS: tl.constexpr,
          BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """x (batch, width) int8; points (batch,): t; sums (rows,): U; rest: a off + w; out (batch, rows) fp32."""
    start = tl.program_id(0) * BN                                 # far offsets once a program, near ones in 32 bits
    row = start + tl.arange(0, BN)
    near = tl.minimum(tl.arange(0, BN), rows - 1 - start)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    known = tl.minimum(token, batch - 1)
    x += (tl.program_id(1) * BM).to(tl.int64) * width
    from_x = (known - tl.program_id(1) * BM)[None, :] * width
    codes += start.to(tl.int64) * stride
    scale += start.to(tl.int64) * groups
    if ZERO:
        zero += start.to(tl.int64) * groups
    if OFFSET:
        offset += start.to(tl.int64) * groups
    total = tl.zeros((BN, BM), tl.float32)
    for g in range(groups):
        d = tl.zeros((BN, BM), tl.int32)
        q = tl.zeros((BM,), tl.int32)
        for first in range(g * group, g * group + group, BK):
            k = first + tl.arange(0, BK)
            xt = tl.load(x + from_x + k[:, None], mask=(k < width)[:, None], other=0)        # (BK, BM)
            c = unpacked(codes, near, first, stride, width, BITS, BN, BK) - off
            if REST or ZERO or OFFSET:
                q += tl.sum(xt.to(tl.int32), 0)
            d = tl.dot(c.to(tl.int8), xt, d, out_dtype=tl.int32)
        d = A * d
        if REST:
            d += rest * q[None, :]
        real = d.to(tl.float32) * part
        if ZERO:
            real -= tl.load(zero + near * groups + g).to(tl.float32)[:, None] * q.to(tl.float32)[None, :]
        real *= tl.load(scale + near * groups + g).to(tl.float32)[:, None]
        if OFFSET:
            real += tl.load(offset + near * groups + g).to(tl.float32)[:, None] * q.to(tl.float32)[None, :]
        total += real
    if POINTS:
        total -= tl.load(points + known)[None, :] * tl.load(sums + start + near)[:, None]
    total *= tl.load(steps + known)[None, :]
    if BIAS:
        total += tl.load(bias + start + near).to(tl.float32)[:, None]
    tl.store(out + token.to(tl.int64)[None, :] * rows + row[:, None], total, mask=(row < rows)[:, None] & (token < batch)[None, :])


def run(x: Tensor, steps: Tensor, points: Tensor | None, matrix: Packed, sums: Tensor | None, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (batch, width) int8 contiguous, steps and points (batch,) fp32, sums (rows,) -> (batch, rows) fp32."""
    batch, bk = len(x), min(plan.bk, widest(matrix))
    out = torch.empty((batch, matrix.rows), dtype=torch.float32, device=x.device)
    assert matrix.whole is not None
    a, w, part = matrix.whole
    off = 128 if matrix.bits == 8 else min(max(-w // a, 0), 2**matrix.bits - 1)
    rest = a * off + w
    launch(gemm8, (-(-matrix.rows // plan.bn), -(-batch // plan.bm)), x, matrix.codes, matrix.scale, matrix.zero, matrix.offset, steps, points,
           sums, bias, out, batch, matrix.rows, matrix.width, matrix.codes.shape[1], matrix.scale.shape[1], matrix.group, off, rest, part,
           warps=plan.warps, stages=plan.stages, fuse=False, A=a, BITS=matrix.bits, ZERO=matrix.zero is not None,
           OFFSET=matrix.offset is not None, REST=rest != 0, POINTS=points is not None, BIAS=bias is not None, BN=plan.bn, BM=plan.bm, BK=bk)
    return out


def widest(matrix: Packed) -> int:
    """The most inputs that a tile may hold: a group ends where a tile does."""
    return min(matrix.group & -matrix.group, 128) if matrix.grouped else 128


@jit
def gemm_fp8(x, codes, scale, steps, bias, out, batch, rows, width, stride, groups, group, BIAS: tl.constexpr, WIDE: tl.constexpr,
             BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """x (batch, width) and codes (rows, stride) e4m3; sums of a group in fp32."""
    start = tl.program_id(0) * BN                                 # far offsets once a program, near ones in 32 bits
    row = start + tl.arange(0, BN)
    near = tl.minimum(tl.arange(0, BN), rows - 1 - start)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    known = tl.minimum(token, batch - 1)
    x += (tl.program_id(1) * BM).to(tl.int64) * width
    from_x = (known - tl.program_id(1) * BM)[None, :] * width
    codes += start.to(tl.int64) * stride
    scale += start.to(tl.int64) * groups
    total = tl.zeros((BN, BM), tl.float32)
    for g in range(groups):
        part = tl.zeros((BN, BM), tl.float32)
        for first in range(g * group, g * group + group, BK):
            k = first + tl.arange(0, BK)
            inside = k < width
            xt = tl.load(x + from_x + k[:, None], mask=inside[:, None], other=0.0)
            w = tl.load(codes + near[:, None] * stride + k[None, :], mask=inside[None, :], other=0.0)
            if WIDE:
                part = tl.dot(w.to(tl.float32), xt.to(tl.float32), part, input_precision="ieee")
            else:
                part = tl.dot(w, xt, part)
        total += part * tl.load(scale + near * groups + g).to(tl.float32)[:, None]
    total *= tl.load(steps + known)[None, :]
    if BIAS:
        total += tl.load(bias + start + near).to(tl.float32)[:, None]
    tl.store(out + token.to(tl.int64)[None, :] * rows + row[:, None], total, mask=(row < rows)[:, None] & (token < batch)[None, :])


def run_fp8(x: Tensor, steps: Tensor, matrix: Packed, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (batch, width) e4m3 contiguous, steps (batch,) fp32 -> (batch, rows) fp32."""
    batch = len(x)
    out = torch.empty((batch, matrix.rows), dtype=torch.float32, device=x.device)
    launch(gemm_fp8, (-(-matrix.rows // plan.bn), -(-batch // plan.bm)), x, matrix.codes.view(torch.float8_e4m3fn), matrix.scale, steps, bias, out,
           batch, matrix.rows, matrix.width, matrix.codes.shape[1], matrix.scale.shape[1], matrix.group, warps=plan.warps, stages=plan.stages,
           fuse=False, BIAS=bias is not None, WIDE=INTERPRETED, BN=plan.bn, BM=plan.bm, BK=min(plan.bk, widest(matrix)))
    return out
