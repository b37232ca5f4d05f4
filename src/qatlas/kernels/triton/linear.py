"""The face of the kernels: products with packed weights, with the signatures of kernels/packed.py, so that a device decides which of the two runs.

    linear(x, w, bias)                        x (..., width) fp16, bf16, fp32 -> (..., rows) of that type; sums in fp32
    linear_int8(codes, steps, zero, w, bias)  codes (..., width) int8, steps and zero (...) -> (..., rows) fp32
    linear_fp8(codes, steps, w, bias)         codes (..., width) float8_e4m3fn, steps (...) -> (..., rows) fp32

All take any strides of activations, and none of them (a batch of 0), too. NaN and infinities go where dequantize-then-multiply puts them.
operators.py shows them to torch.compile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.error import QuantError
from ...core.floats import Float
from ...core.grain import Grain, Group
from ...core.grid import Grid
from .lang import capability, need
from .matrix import Matrix, why_not
from .operators import packed_linear, packed_linear_fp8, packed_linear_int8, product_int8

TYPES = (torch.float16, torch.bfloat16, torch.float32)


def linear(x: Tensor, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. Where a gradient is asked for, the weight is dequantized: packed weights have no backward of their own.

    Raises:
        QuantError: activations of another type or width. RunError: no Triton, or no device for it.
    """
    _fits(x, w, bias)
    if x.dtype not in TYPES:
        raise QuantError(f"activations of {x.dtype}; the Triton kernels take float16, bfloat16 and float32")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return F.linear(x, w.dequantize().to(x.dtype), bias if bias is None else bias.to(x.dtype))
    p = w.floats
    y: Tensor = packed_linear(x, p.codes, p.scale, p.zero, p.table, bias, p.shift, p.rows, p.width, p.bits, p.group)
    return y


def linear_int8(codes: Tensor, steps: Tensor, zero: Tensor | None, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """step (codes - zero) W^T + bias for int8 codes (..., width) with a step and a zero a token (...): fp32, the same bits everywhere (gemm8.py).

    Raises:
        QuantError: tensors of other shapes or types, or a weight without whole numbers. RunError: no Triton, or no device for it.
    """
    _fits(codes, w, bias)
    if reason := why_not(w.grid, w.grain, w.shape, integers=True):
        raise QuantError(f"no kernel multiplies int8 activations with this packed weight: {reason}")
    if codes.dtype != torch.int8:
        raise QuantError(f"activation codes of {codes.dtype}; the integer kernels take int8")
    _a_token(codes, steps, zero)
    p, sums = w.integers, None if zero is None else _sums(w)
    assert p.whole is not None
    y: Tensor = packed_linear_int8(codes, steps, zero, p.codes, p.scale, p.zero, p.offset, sums, bias, p.rows, p.width, p.bits, p.group, *p.whole)
    return y


def _sums(w: Matrix) -> Tensor:
    """U: the sum of each row, by the lines of `linear_int8`; kept with the weight."""
    known: Tensor | None = w.__dict__.get("_sums")
    if known is None:
        one = torch.ones(1, w.shape[1], dtype=torch.int8, device=w.codes.device)
        known = product_int8(one, torch.ones(1, device=one.device), None, w.integers, None, None)[0]
        w.__dict__["_sums"] = known
    return known


def linear_fp8(codes: Tensor, steps: Tensor, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """step codes W^T + bias, both e4m3: codes (..., width) float8_e4m3fn, W of the grid Float(4, 3), steps (...). fp32.

    Raises:
        QuantError: other types, or a GPU before compute capability 8.9. RunError: no Triton, or no device for it.
    """
    _fits(codes, w, bias)
    if reason := why_not_fp8(w.grid, w.grain, w.shape, codes.device):
        raise QuantError(f"no fp8 kernel: {reason}")
    if codes.dtype != torch.float8_e4m3fn:
        raise QuantError(f"activations of {codes.dtype}; the fp8 kernel takes float8_e4m3fn")
    _a_token(codes, steps, None)
    p = w.floats
    y: Tensor = packed_linear_fp8(codes, steps, p.codes, p.scale, bias, p.rows, p.width, p.group)
    return y


def why_not_fp8(grid: Grid, grain: Grain, shape: tuple[int, ...], device: torch.device) -> str:
    """Why the fp8 tensor cores cannot multiply with such a weight there; "" where they can."""
    if grid != Float(4, 3):
        return f"the weight is of {grid}, not of Float(4, 3)"
    if reason := why_not(grid, grain, shape):
        return reason
    if isinstance(grain, Group) and grain.size != shape[1] and grain.size % 32:
        return f"groups of {grain.size}; the tensor cores take 32 inputs at a time"
    have = capability(device)
    return "" if have >= (8, 9) else f"it wants compute capability 8.9 (Ada, Hopper), this GPU has {have[0]}.{have[1]}; take linear_int8"


def _fits(x: Tensor, w: Matrix, bias: Tensor | None) -> None:
    need(x.device)
    if x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise QuantError(f"activations of shape {tuple(x.shape)} do not fit a weight of {w.shape[0]} x {w.shape[1]}")
    if x.device != w.codes.device or (bias is not None and bias.device != x.device):
        raise QuantError(f"activations on {x.device}, weight on {w.codes.device}{'' if bias is None else f', bias on {bias.device}'}: one device")
    if bias is not None and tuple(bias.shape) != w.shape[:1]:
        raise QuantError(f"the bias of a packed weight {w.shape} is ({w.shape[0]},), not {tuple(bias.shape)}")


def _a_token(codes: Tensor, steps: Tensor, zero: Tensor | None) -> None:
    for name, t in (("step", steps), ("zero", zero)):
        if t is not None and t.shape != codes.shape[:-1]:
            raise QuantError(f"codes {tuple(codes.shape)} have one {name} a token, {tuple(codes.shape[:-1])}, not {tuple(t.shape)}")
