"""The operators of packed.py as torch knows them: schema, CPU, shapes alone (for compile and export), and autocast.

Each takes tensors and numbers only, so that a graph can hold it. Under autocast `packed_linear` does what torch's linear does: it takes x in the
lower type and answers in it; sums and scales stay fp32. packed.py has checked what is multiplied; what a kernel's memory safety rests on is checked
here again, since an operator can be called by anyone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.error import QuantError
from .library import Weight, library

DENSE = 16                                                        # QN_TERNARY of native.h
LIBRARY = torch.library.Library("qatlas", "FRAGMENT")
WEIGHT = "Tensor w, Tensor scale, Tensor? zero, Tensor? offset, Tensor? bias"
CONF = "int[] conf, float[] reals, int[] strides, int threads"
LIBRARY.define(f"packed_linear(Tensor x, {WEIGHT}, Tensor? table, {CONF}) -> Tensor")
LIBRARY.define(f"packed_linear_int8(Tensor x, Tensor step, Tensor? xzero, {WEIGHT}, Tensor? sums, {CONF}) -> Tensor")
packed_linear: Any = torch.ops.qatlas.packed_linear.default
packed_linear_int8: Any = torch.ops.qatlas.packed_linear_int8.default


def _weight(w: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, table: Tensor | None, conf: Sequence[int],
            reals: Sequence[float], strides: Sequence[int]) -> Weight:
    rows, cols, group, groups, width, shift, whole = conf
    part, unit, low = reals
    stride = 4 * -(-group // 20) * groups if width == DENSE else -(-cols * width // 8)
    last = (rows - 1) * strides[0] + (groups - 1) * strides[1] + 1
    if min(rows, cols, group, groups, *strides) < 0 or group * groups != cols or width not in (1, 2, 3, 4, 8, DENSE):
        raise QuantError(f"a packed weight cannot be {tuple(conf)}")
    if tuple(w.shape) != (rows, stride) or w.dtype != torch.uint8 or not w.is_contiguous():
        raise QuantError(f"packed codes are contiguous uint8 ({rows}, {stride}), not {w.dtype} {tuple(w.shape)}")
    for t, least in ((scale, last), (zero, last), (offset, last), (table, 16)):
        if t is not None and (t.dtype != torch.float32 or not t.is_contiguous() or t.numel() < least):
            raise QuantError(f"scales, zeros, offsets and tables are contiguous fp32, here {least} or more, not {t.dtype} {tuple(t.shape)}")
    return Weight(w.data_ptr(), stride, rows, cols, group, groups, width, shift, whole, part, unit, low, _at(table), scale.data_ptr(), _at(zero),
                  _at(offset), strides[0], strides[1])


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _plain(t: Tensor | None, dtype: torch.dtype, n: int) -> Tensor | None:
    """As a kernel reads it: contiguous, n elements."""
    if t is None:
        return None
    if t.numel() != n:
        raise QuantError(f"a kernel expects {n} elements, not {tuple(t.shape)}")
    return t.to(dtype).contiguous()


def _linear(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, bias: Tensor | None, table: Tensor | None,
            conf: Sequence[int], reals: Sequence[float], strides: Sequence[int], threads: int) -> Tensor:
    rows, cols = conf[:2]
    weight = _weight(w, scale, zero, offset, table, conf, reals, strides)
    if table is None and conf[4] != 8:
        raise QuantError("codes of fewer than 8 bits need the table of their values")
    tokens = x.numel() // cols if cols else x.shape[:-1].numel()
    plain, b, y = _plain(x, torch.float32, tokens * cols), _plain(bias, torch.float32, rows), x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)
    if y.numel() and not cols:
        y.zero_() if b is None else y.copy_(b.expand_as(y))
    elif y.numel():
        assert plain is not None
        library().qn_linear(ctypes.byref(weight), plain.data_ptr(), tokens, _at(b), y.data_ptr(), threads or torch.get_num_threads())
    return y.to(x.dtype)


def _linear_int8(x: Tensor, step: Tensor, xzero: Tensor | None, w: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
                 bias: Tensor | None, sums: Tensor | None, conf: Sequence[int], reals: Sequence[float], strides: Sequence[int],
                 threads: int) -> Tensor:
    rows, cols = conf[:2]
    weight = _weight(w, scale, zero, offset, None, conf, reals, strides)
    if x.dtype != torch.int8 or reals[0] == 0 or (xzero is None) != (sums is None):
        raise QuantError(f"a product of whole numbers takes int8, a weight of whole numbers, and sums where x has zeros; x is {x.dtype}")
    tokens = x.numel() // cols if cols else x.shape[:-1].numel()
    s, z, u, b = (_plain(t, torch.float32, n) for t, n in ((step, tokens), (xzero, tokens), (sums, rows), (bias, rows)))
    plain, y = _plain(x, torch.int8, tokens * cols), x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)
    if y.numel() and not cols:
        y.zero_() if b is None else y.copy_(b.expand_as(y))
    elif y.numel():
        assert plain is not None and s is not None
        library().qn_linear_int8(ctypes.byref(weight), plain.data_ptr(), tokens, s.data_ptr(), _at(z), _at(u), _at(b), y.data_ptr(),
                                 threads or torch.get_num_threads())
    return y


def _low(x: Tensor, *rest: Any) -> Tensor:
    """Under autocast."""
    low = torch.get_autocast_dtype("cpu")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        y: Tensor = packed_linear(x.to(low), *rest)
    return y


def _shape(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, bias: Tensor | None, table: Tensor | None,
           conf: Sequence[int], reals: Sequence[float], strides: Sequence[int], threads: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], conf[0]))


def _shape_int8(x: Tensor, step: Tensor, xzero: Tensor | None, w: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
                bias: Tensor | None, sums: Tensor | None, conf: Sequence[int], reals: Sequence[float], strides: Sequence[int],
                threads: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], conf[0]), dtype=torch.float32)


LIBRARY.impl("packed_linear", _linear, "CPU")
LIBRARY.impl("packed_linear_int8", _linear_int8, "CPU")
LIBRARY.impl("packed_linear", _low, "AutocastCPU")
torch.library.register_fake("qatlas::packed_linear", _shape, lib=LIBRARY)
torch.library.register_fake("qatlas::packed_linear_int8", _shape_int8, lib=LIBRARY)
