"""Integer activations times a packed weight, on the integer tensor cores (int8 x int8 -> int32); and the same for fp8.

With activations q (zero point t of a token, if it has one) and a weight S (c - Z), a group's share of an output is S I, with the integer

    I = sum (q - t) (A c - A Z)  =  A D + R Q - t (A E + R n)        D = sum q e,  Q = sum q,  E = sum e,  e = c - off in int8,  R = A (off - Z)

A is 1, or 2 where Z is a half number (HalfStep, Sign: then S / 2 stands for S). All sums are exact in int32, so I is the same whatever the order, on
whatever chip. What follows is fp32 in one order, without fused roundings: y = step * (S_0 I_0 + S_1 I_1 + ...) + bias, each product and each sum
rounded once. So the result equals a plain integer computation bit for bit (tests/kernels/triton).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lang import INTERPRETED, jit, launch, tl
from .matrix import Matrix
from .plan import Plan
from .tile import codes as unpacked


@jit
def gemm8(x, codes, scale, zero, steps, points, bias, out, batch, rows, width, stride, groups, group, off, rest, A: tl.constexpr,
          BITS: tl.constexpr, GROUPED: tl.constexpr, ZERO: tl.constexpr, REST: tl.constexpr, POINTS: tl.constexpr, BIAS: tl.constexpr,
          BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """x (batch, width) int8; points: the tokens' zero points, int32; rest: R where it is one number; out (batch, rows) fp32."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    known = tl.minimum(token, batch - 1).to(tl.int64)
    if POINTS:
        point = tl.load(points + known)
    total = tl.zeros((BN, BM), tl.float32)
    for g in range(groups):
        d = tl.zeros((BN, BM), tl.int32)
        q = tl.zeros((BM,), tl.int32)
        e = tl.zeros((BN,), tl.int32)
        for first in range(g * group, g * group + group, BK):
            k = first + tl.arange(0, BK)
            xt = tl.load(x + known[None, :] * width + k[:, None], mask=(k < width)[:, None], other=0)        # (BK, BM)
            c = unpacked(codes, safe, first, stride, width, BITS, BN, BK) - off
            if POINTS:
                c = tl.where((k < width)[None, :], c, 0)
                e += tl.sum(c, 1)
            if REST:
                q += tl.sum(xt.to(tl.int32), 0)
            d = tl.dot(c.to(tl.int8), xt, d, out_dtype=tl.int32)
        whole = A * d
        if REST:
            if ZERO:
                r = (A * (off - tl.load(zero + safe * groups + g).to(tl.float32))).to(tl.int32)
            else:
                r = tl.zeros((BN,), tl.int32) + rest
            whole += r[:, None] * q[None, :]
            if POINTS:
                e = A * e + r * group
        elif POINTS:
            e = A * e
        if POINTS:
            whole -= e[:, None] * point[None, :]
        total += whole.to(tl.float32) * (tl.load(scale + safe * groups + g).to(tl.float32) * (1.0 / A))[:, None]
    total *= tl.load(steps + known)[None, :]
    if BIAS:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    tl.store(out + token.to(tl.int64)[None, :] * rows + row[:, None], total, mask=(row < rows)[:, None] & (token < batch)[None, :])


def run(x: Tensor, steps: Tensor, points: Tensor | None, matrix: Matrix, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (batch, width) int8 contiguous, steps (batch,) fp32, points (batch,) int32 -> (batch, rows) fp32."""
    batch, bk = len(x), min(plan.bk, widest(matrix))
    out = torch.empty((batch, matrix.rows), dtype=torch.float32, device=x.device)
    off, rest = offsets(matrix)
    launch(gemm8, (-(-matrix.rows // plan.bn), -(-batch // plan.bm)), x, matrix.codes, matrix.scale, matrix.zero, steps, points, bias, out, batch,
           matrix.rows, matrix.width, matrix.codes.shape[1], matrix.scale.shape[1], matrix.group, off, rest, warps=plan.warps, stages=plan.stages,
           fuse=False, A=matrix.halves, BITS=matrix.bits, GROUPED=matrix.grouped, ZERO=matrix.zero is not None,
           REST=matrix.zero is not None or rest != 0, POINTS=points is not None, BIAS=bias is not None, BN=plan.bn, BM=plan.bm, BK=bk)
    return out


def offsets(matrix: Matrix) -> tuple[int, int]:
    """off, which brings every code into int8, and R where zeros do not differ."""
    if matrix.zero is not None or matrix.bits == 8:
        off = 128 if matrix.bits == 8 else 0
    else:
        off = min(max(int(matrix.shift // 1), 0), 2**matrix.bits - 1)
    return off, 0 if matrix.zero is not None else round(matrix.halves * (off - matrix.shift))


def widest(matrix: Matrix) -> int:
    """The most inputs that a tile may hold: a group ends where a tile does."""
    return min(matrix.group & -matrix.group, 128) if matrix.grouped else 128


def why_not_int8(matrix: Matrix) -> str:
    """Why integers cannot multiply this weight; nothing where they can."""
    if not matrix.halves:
        return "levels or zeros that are no whole or half numbers of one step: integers cannot multiply them"
    if matrix.grouped and matrix.group % 32:
        return f"groups of {matrix.group}: the integer tensor cores take 32 inputs at a time"
    if matrix.group * 255 * 255 * matrix.halves * (1 if matrix.bits == 8 else 2.0 ** (matrix.bits - 8)) >= 2**31:
        return f"{matrix.group} inputs under one step: their products need not fit into 32 bits"
    return ""


@jit
def gemm_fp8(x, codes, scale, steps, bias, out, batch, rows, width, stride, groups, group, BIAS: tl.constexpr, WIDE: tl.constexpr,
             BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """x (batch, width) and codes (rows, stride) e4m3; sums of a group in fp32."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    known = tl.minimum(token, batch - 1).to(tl.int64)
    total = tl.zeros((BN, BM), tl.float32)
    for g in range(groups):
        part = tl.zeros((BN, BM), tl.float32)
        for first in range(g * group, g * group + group, BK):
            k = first + tl.arange(0, BK)
            inside = k < width
            xt = tl.load(x + known[None, :] * width + k[:, None], mask=inside[:, None], other=0.0)
            w = tl.load(codes + safe[:, None] * stride + k[None, :], mask=inside[None, :], other=0.0)
            if WIDE:
                part = tl.dot(w.to(tl.float32), xt.to(tl.float32), part, input_precision="ieee")
            else:
                part = tl.dot(w, xt, part)
        total += part * tl.load(scale + safe * groups + g).to(tl.float32)[:, None]
    total *= tl.load(steps + known)[None, :]
    if BIAS:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    tl.store(out + token.to(tl.int64)[None, :] * rows + row[:, None], total, mask=(row < rows)[:, None] & (token < batch)[None, :])


def run_fp8(x: Tensor, steps: Tensor, matrix: Matrix, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (batch, width) e4m3 contiguous, steps (batch,) fp32 -> (batch, rows) fp32."""
    batch = len(x)
    out = torch.empty((batch, matrix.rows), dtype=torch.float32, device=x.device)
    launch(gemm_fp8, (-(-matrix.rows // plan.bn), -(-batch // plan.bm)), x, matrix.codes.view(torch.float8_e4m3fn), matrix.scale, steps, bias, out,
           batch, matrix.rows, matrix.width, matrix.codes.shape[1], matrix.scale.shape[1], matrix.group, warps=plan.warps, stages=plan.stages,
           fuse=False, BIAS=bias is not None, WIDE=INTERPRETED, BN=plan.bn, BM=plan.bm, BK=min(plan.bk, widest(matrix)))
    return out
