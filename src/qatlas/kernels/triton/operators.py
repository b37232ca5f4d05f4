"""The kernels as torch's operators: tensors and numbers in, a tensor out, its shape alone for torch.compile and export.

And how a product finds its kernel and its plan."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm, gemm8, gemv
from .matrix import Packed
from .plan import Plan, plan


def product(x: Tensor, w: Packed, bias: Tensor | None, given: Plan | None = None) -> Tensor:
    """x (batch, width) -> (batch, rows), by the kernel for such a batch. Where there is nothing to add up, the bias or zeros."""
    if not (len(x) and w.rows and w.width):
        return _nothing(x, w.rows, bias, x.dtype)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    if len(x) == 1:
        return gemv.run(x[0], w, bias, given or plan("gemv", w, 1)).unsqueeze(0)
    return gemm.run(x, w, bias, given or plan("gemm", w, len(x), gemm.widest(w)))


@torch.library.custom_op("qatlas_triton::linear", mutates_args=())
def packed_linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bias: Tensor | None, shift: float, rows: int,
            width: int, bits: int, group: int) -> Tensor:
    w = Packed(codes, scale, zero, None, table, shift, rows, width, bits, group)
    return product(x.reshape(x.shape[:-1].numel(), width), w, bias).reshape(*x.shape[:-1], rows)


@packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bias: Tensor | None, shift: float, rows: int, width: int,
      bits: int, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def product_int8(x: Tensor, steps: Tensor, points: Tensor | None, w: Packed, sums: Tensor | None, bias: Tensor | None,
                 given: Plan | None = None) -> Tensor:
    """x (batch, width) int8, steps and points (batch,), sums (rows,) -> (batch, rows) fp32."""
    if not (len(x) and w.rows and w.width):
        return _nothing(x, w.rows, bias, torch.float32)
    points = None if points is None else points.float().contiguous()
    plans = given or plan("int8", w, len(x), gemm8.widest(w))
    return gemm8.run(x.contiguous(), steps.float().contiguous(), points, w, sums, None if bias is None else bias.contiguous(), plans)


@torch.library.custom_op("qatlas_triton::linear_int8", mutates_args=())
def packed_linear_int8(codes: Tensor, steps: Tensor, points: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
                 sums: Tensor | None, bias: Tensor | None, rows: int, width: int, bits: int, group: int, a: int, whole: int, part: float) -> Tensor:
    w = Packed(packed, scale, zero, offset, None, 0.0, rows, width, bits, group, (a, whole, part))
    points = None if points is None else points.reshape(-1)
    return product_int8(codes.reshape(codes.shape[:-1].numel(), width), steps.reshape(-1), points, w, sums, bias).reshape(*codes.shape[:-1], rows)


@packed_linear_int8.register_fake
def _(codes: Tensor, steps: Tensor, points: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
      sums: Tensor | None, bias: Tensor | None, rows: int, width: int, bits: int, group: int, a: int, whole: int, part: float) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], rows, dtype=torch.float32)


def product_fp8(x: Tensor, steps: Tensor, w: Packed, bias: Tensor | None, given: Plan | None = None) -> Tensor:
    """x (batch, width) e4m3 -> (batch, rows) fp32."""
    if not (len(x) and w.rows and w.width):
        return _nothing(x, w.rows, bias, torch.float32)
    plans = given or plan("fp8", w, len(x), gemm8.widest(w))
    return gemm8.run_fp8(x.contiguous(), steps.float().contiguous(), w, None if bias is None else bias.contiguous(), plans)


@torch.library.custom_op("qatlas_triton::linear_fp8", mutates_args=())
def packed_linear_fp8(codes: Tensor, steps: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, width: int, group: int) -> Tensor:
    w = Packed(packed, scale, None, None, None, 0.0, rows, width, 8, group)
    return product_fp8(codes.reshape(codes.shape[:-1].numel(), width), steps.reshape(-1), w, bias).reshape(*codes.shape[:-1], rows)


@packed_linear_fp8.register_fake
def _(codes: Tensor, steps: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, width: int, group: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], rows, dtype=torch.float32)


def _nothing(x: Tensor, rows: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.zeros(len(x), rows, dtype=dtype, device=x.device)
    return y if bias is None else y + bias.to(dtype)
