"""The face of the kernels: products with packed weights, as torch custom operators, so that torch.compile and autocast see one opaque call.

    linear(x, matrix, bias)                        x (..., width) fp16, bf16, fp32 -> (..., rows) of that type; sums in fp32
    linear_int8(codes, steps, zero, matrix, bias)  codes (..., width) int8 or uint8, steps (...) fp32, zero (...) or None -> (..., rows) fp32
    linear_fp8(codes, steps, matrix, bias)         codes (..., width) float8_e4m3fn, steps (...) -> (..., rows) fp32

All take any shape and strides of activations, none of them (a batch of 0) too. NaN and infinities go where dequantize-then-multiply puts them. Nothing
here has a gradient: packed weights do not train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.error import QuantError
from . import gemm as _gemm
from . import gemm8 as _gemm8
from . import gemv as _gemv
from .lang import capability, need
from .matrix import Matrix
from .plan import Plan, plan

TYPES = (torch.float16, torch.bfloat16, torch.float32)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, W = matrix.

    Raises:
        QuantError: activations of another type or width. RunError: no Triton, or no device for it.
    """
    _fits(x, matrix, bias)
    if x.dtype not in TYPES:
        raise QuantError(f"activations of {x.dtype}; the Triton kernels take float16, bfloat16 and float32")
    y: Tensor = _linear(x, matrix.codes, matrix.scale, matrix.zero, matrix.table, bias, matrix.shift, matrix.rows, matrix.width, matrix.bits,
                        matrix.group)
    return y


def _fits(x: Tensor, matrix: Matrix, bias: Tensor | None) -> None:
    need(x.device)
    if x.dim() < 1 or x.shape[-1] != matrix.width:
        raise QuantError(f"activations of shape {tuple(x.shape)} do not fit a weight of {matrix.rows} x {matrix.width}")
    if x.device != matrix.codes.device or (bias is not None and bias.device != x.device):
        raise QuantError(f"activations on {x.device}, weight on {matrix.codes.device}"
                         f"{'' if bias is None else f', bias on {bias.device}'}: all on one device")
    if bias is not None and bias.shape != (matrix.rows,):
        raise QuantError(f"a bias of shape {tuple(bias.shape)} for {matrix.rows} outputs")


def product(x: Tensor, matrix: Matrix, bias: Tensor | None, given: Plan | None = None) -> Tensor:
    """x (batch, width) -> (batch, rows), by the kernel for such a batch. Where there is nothing to add up, the bias or zeros."""
    if not (len(x) and matrix.rows and matrix.width):
        y = x.new_zeros(len(x), matrix.rows)
        return y if bias is None else y + bias.to(y.dtype)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    if len(x) == 1:
        return _gemv.run(x[0], matrix, bias, given or plan("gemv", matrix, 1)).unsqueeze(0)
    return _gemm.run(x, matrix, bias, given or plan("gemm", matrix, len(x), _gemm.widest(matrix)))


@torch.library.custom_op("qatlas_triton::linear", mutates_args=())
def _linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bias: Tensor | None, shift: float, rows: int,
            width: int, bits: int, group: int) -> Tensor:
    matrix = Matrix(codes, scale, zero, table, shift, rows, width, bits, group)
    return product(x.reshape(x.shape[:-1].numel(), width), matrix, bias).reshape(*x.shape[:-1], rows)


@_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bias: Tensor | None, shift: float, rows: int, width: int,
      bits: int, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def linear_int8(codes: Tensor, steps: Tensor, zero: Tensor | None, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """steps (codes - zero) W^T + bias for integer activations, exact up to the last few roundings (gemm8.py). codes (..., width) int8 or uint8; steps,
    zero (...) or (..., 1).

    Raises:
        QuantError: activations or a weight that integers cannot multiply. RunError: no Triton, or no device for it.
    """
    _fits(codes, matrix, bias)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise QuantError(f"activation codes of {codes.dtype}; the integer kernels take int8 and uint8")
    if reason := _gemm8.why_not_int8(matrix):
        raise QuantError(f"no integer kernel: {reason}")
    y: Tensor = _linear_int8(codes, steps, zero, matrix.codes, matrix.scale, matrix.zero, bias, matrix.shift, matrix.rows, matrix.width, matrix.bits,
                             matrix.group, matrix.halves)
    return y


@torch.library.custom_op("qatlas_triton::linear_int8", mutates_args=())
def _linear_int8(codes: Tensor, steps: Tensor, points: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
                 shift: float, rows: int, width: int, bits: int, group: int, halves: int) -> Tensor:
    matrix = Matrix(packed, scale, zero, None, shift, rows, width, bits, group, halves)
    return product_int8(codes.reshape(codes.shape[:-1].numel(), width), steps, points, matrix, bias).reshape(*codes.shape[:-1], rows)


@_linear_int8.register_fake
def _(codes: Tensor, steps: Tensor, points: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, shift: float,
      rows: int, width: int, bits: int, group: int, halves: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], rows, dtype=torch.float32)


def product_int8(x: Tensor, steps: Tensor, points: Tensor | None, matrix: Matrix, bias: Tensor | None, given: Plan | None = None) -> Tensor:
    """x (batch, width) int8 or uint8 -> (batch, rows) fp32."""
    if not (len(x) and matrix.rows and matrix.width):
        y = x.new_zeros(len(x), matrix.rows, dtype=torch.float32)
        return y if bias is None else y + bias.float()
    points = None if points is None else points.reshape(-1).to(torch.int32).expand(len(x)).contiguous()
    x = x.contiguous()
    if x.dtype == torch.uint8:                                    # 0 .. 255 as -128 .. 127, the zero point with them
        x = (x ^ 128).view(torch.int8)
        points = (0 if points is None else points) - torch.full((len(x),), 128, dtype=torch.int32, device=x.device)
    steps = steps.reshape(-1).float().expand(len(x)).contiguous()
    plans = given or plan("int8", matrix, len(x), _gemm8.widest(matrix))
    return _gemm8.run(x, steps, points, matrix, None if bias is None else bias.contiguous(), plans)


def linear_fp8(codes: Tensor, steps: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """steps codes W^T + bias, both e4m3: codes (..., width) float8_e4m3fn, W of the grid Float(4, 3); steps (...) or (..., 1).

    Raises:
        QuantError: other types, or a GPU before compute capability 8.9. RunError: no Triton, or no device for it.
    """
    _fits(codes, matrix, bias)
    if reason := why_not_fp8(matrix, codes.device):
        raise QuantError(f"no fp8 kernel: {reason}")
    if codes.dtype != torch.float8_e4m3fn:
        raise QuantError(f"activations of {codes.dtype}; the fp8 kernel takes float8_e4m3fn")
    y: Tensor = _linear_fp8(codes, steps, matrix.codes, matrix.scale, bias, matrix.rows, matrix.width, matrix.group)
    return y


def why_not_fp8(matrix: Matrix, device: torch.device) -> str:
    """Why the fp8 tensor cores cannot multiply this weight there; nothing where they can."""
    if not matrix.e4m3 or matrix.zero is not None:
        return "the weight is not of the grid Float(4, 3)"
    if matrix.grouped and matrix.group % 32:
        return f"groups of {matrix.group}: the tensor cores take 32 inputs at a time"
    have = capability(device)
    return "" if have >= (8, 9) else f"fp8 wants compute capability 8.9 (Ada, Hopper), this GPU has {have[0]}.{have[1]}; take int8"


@torch.library.custom_op("qatlas_triton::linear_fp8", mutates_args=())
def _linear_fp8(codes: Tensor, steps: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, width: int, group: int) -> Tensor:
    matrix = Matrix(packed, scale, None, None, 0.0, rows, width, 8, group, 0, True)
    return product_fp8(codes.reshape(codes.shape[:-1].numel(), width), steps, matrix, bias).reshape(*codes.shape[:-1], rows)


@_linear_fp8.register_fake
def _(codes: Tensor, steps: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, width: int, group: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], rows, dtype=torch.float32)


def product_fp8(x: Tensor, steps: Tensor, matrix: Matrix, bias: Tensor | None, given: Plan | None = None) -> Tensor:
    """x (batch, width) e4m3 -> (batch, rows) fp32."""
    if not (len(x) and matrix.rows and matrix.width):
        y = torch.zeros(len(x), matrix.rows, device=x.device)
        return y if bias is None else y + bias.float()
    steps = steps.reshape(-1).float().expand(len(x)).contiguous()
    plans = given or plan("fp8", matrix, len(x), _gemm8.widest(matrix))
    return _gemm8.run_fp8(x.contiguous(), steps, matrix, None if bias is None else bias.contiguous(), plans)
