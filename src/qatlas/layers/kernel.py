"""Kernel: how a packed layer multiplies without dequantizing, where it was asked to (model/fast.py).

    floats    y = q W^T straight from the codes: kernels.packed.linear. q is the input, after its quantizer where there is one
    int8      the codes that the layer's own input quantizer makes, as whole numbers: kernels.packed.linear_int8

Codes stay where they lie. Steps are read in fp32: those of a narrower type are copied. Both agree with the exact path up to the order of sums, within

    |y - exact y| <= 2^-23 (n + 16) sum_k |q_k| (|s v_k| + |s z|)         n inputs, in fp32

int8 in a model of another type is nearer to fp32 than the exact path is: that one rounds the quantized input to the model's type, this one does not.

Where a graph is asked for, the layer goes the exact way, and says so once: kernels have no gradient. A write of codes or scales is noticed by their
version counters and by their identity; whoever writes through `.data` calls `fast` again.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..core.grain import PerToken
from ..core.grid import Uniform
from ..core.quantizer import Quantizer
from ..kernels import operators, packed, tokens
from ..kernels.library import library
from .store import Store

FLOATS, INT8 = "floats", "int8"


class Kernel:
    """The product of one layer. parts: matrices that lie one below the other in it, each with tokens of its own (experts)."""

    def __init__(self, layer: Any, parts: int = 1) -> None:
        self.store, self.quantizer, self.parts = layer.store, layer.input_quantizer, parts
        self.integers = why_not_int8(layer) == ""
        self.matrices = self._matrices()
        self._stamp = self._now()

    @property
    def way(self) -> str:
        """floats or int8."""
        return INT8 if self.integers else FLOATS

    def _now(self) -> tuple[Any, ...]:
        return tuple((id(t), t._version, t.dtype, t.device) for t in (*self.store.buffers(), *self.store.parameters()))

    @torch.no_grad()
    def _matrices(self) -> list[packed.Matrix]:
        rows, store, places = self.store.shape[0] // self.parts, self.store, self.store.places()
        found = []
        for i in range(self.parts):
            at = slice(i * rows, (i + 1) * rows)
            scale, zero, offset = places if self.parts == 1 else [t if t is None else store.grain.of_rows(t, at) for t in places]
            found.append(packed.Matrix.from_parts(store.codes[at], scale, zero, offset, store.grid, store.grain, (rows, *store.shape[1:])))  # type: ignore[arg-type]
        zeros = self.integers and whole_numbers(self.quantizer, torch.zeros(1, store.shape[1]))[2] is not None
        self.sums = [w.sums if zeros else None for w in found]        # of the rows, which a zero of the input multiplies
        return found

    def serves(self, x: Tensor) -> bool:
        """Whether this call takes the kernel: no graph is asked for, and x is where the codes are."""
        if torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                _say()
            return False
        return x.device.type == "cpu"

    def __call__(self, x: Tensor, bias: Tensor | None, sizes: list[int] | None = None) -> Tensor:
        """x (..., in), not yet quantized -> (..., out). sizes: rows of x for each part."""
        if not torch.compiler.is_compiling() and self._stamp != self._now():
            self.matrices, self._stamp = self._matrices(), self._now()
        return self._whole(x, bias, sizes) if self.integers else self._floats(x, bias, sizes)

    def _floats(self, x: Tensor, bias: Tensor | None, sizes: list[int] | None) -> Tensor:
        q = x if self.quantizer is None else self.quantizer(x)
        if sizes is None:
            return packed.linear(q, self.matrices[0], bias)
        return _joined([packed.linear(part, w) for part, w in zip(q.split(sizes), self.matrices, strict=True) if part.shape[0]], q, self.matrices[0])

    def _whole(self, x: Tensor, bias: Tensor | None, sizes: list[int] | None) -> Tensor:
        codes, steps, zero = whole_numbers(self.quantizer, x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if sizes is None:
            return _integers(codes, steps, zero, self.matrices[0], bias, self.sums[0]).to(dtype)
        zeros = [None] * len(sizes) if zero is None else zero.split(sizes)
        each = zip(codes.split(sizes), steps.split(sizes), zeros, self.matrices, self.sums, strict=True)
        parts = [_integers(q, s, z, w, None, u).to(dtype) for q, s, z, w, u in each if q.shape[0]]
        return _joined(parts, x, self.matrices[0])


def _integers(codes: Tensor, steps: Tensor, zero: Tensor | None, w: packed.Matrix, bias: Tensor | None, sums: Tensor | None) -> Tensor:
    """packed.linear_int8, whose questions were answered when the kernel was made: a graph holds the operator alone."""
    rest = (w.codes, w.scale, w.zero, w.offset, bias, None if zero is None else sums, w.conf, w.reals, w.strides, 0)
    return operators.packed_linear_int8(codes, steps, zero, *rest)  # type: ignore[no-any-return]


def _joined(parts: list[Tensor], x: Tensor, w: packed.Matrix) -> Tensor:
    return torch.cat(parts) if parts else x.new_zeros(0, w.shape[0])


def whole_numbers(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes int8 (..., in), steps (...), zeros (...) or None) of x (..., in), x = step (code - zero), by its quantizer. Layers that quantize one
    tensor alike (query, key and value) are given the same."""
    eager = not torch.compiler.is_compiling()
    known = getattr(x, "_whole", None) if eager else None
    if known is not None and known[0] == quantizer.quant and known[1] == x._version:
        return known[2]  # type: ignore[no-any-return]
    if eager and x.dtype == torch.float32 and x.device.type == "cpu" and not tokens.why_not(quantizer.quant):
        found: tuple[Tensor, Tensor, Tensor | None] = (*tokens.tokens(x, quantizer.quant), None)
    else:
        found = _measured(quantizer, x)
    if eager:
        x._whole = quantizer.quant, x._version, found  # type: ignore[attr-defined]
    return found


def _measured(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """`whole_numbers` by the quantizer itself."""
    q, grid = quantizer.quantize(x), quantizer.quant.grid
    down = 0 if grid.low < 0 else 128                             # unsigned codes move into int8, and so does their zero
    codes = (q.codes.to(torch.int16) - (2 ** (int(grid.bits) - 1) if grid.low < 0 else down)).to(torch.int8)
    zero = q.zero if not down else torch.full_like(q.steps, -128.0) if q.zero is None else q.zero - down
    return codes, torch.where(q.steps.isfinite(), q.steps, math.nan), zero        # of a token with NaN or an infinity nothing is known


def why_not(layer: Any, parts: int = 1) -> str:
    """Why no kernel multiplies in this packed layer; "" where one does."""
    if not isinstance(layer.store, Store):
        return "its codes are of two kinds, with a mask"
    if layer.adapter is not None:
        return "it has an adapter"
    store = layer.store
    if store.codes.device.type != "cpu":
        return f"its codes are on {store.codes.device}; the kernels run on CPU"
    rows = store.shape[0] // parts
    if parts > 1 and store.grain.of_rows(torch.empty(store.grain.scale_shape(store.shape)), slice(0, rows)) is None:
        return f"its scales serve {store.grain}, which runs over several experts"
    if reason := packed.why_not(store.grid, store.grain, (rows, *store.shape[1:])):
        return reason
    return "" if library() is not None else "the CPU kernels were not built (no C++ compiler); qatlas doctor says more"


def why_not_int8(layer: Any) -> str:
    """Why the kernel of a layer takes its input in floats; "" where it takes the codes."""
    quantizer, store = layer.input_quantizer, layer.store
    if quantizer is None or not quantizer.on:
        return "its input is in full precision"
    quant = quantizer.quant
    if type(quantizer) is not Quantizer or not quant.plain or not isinstance(quant.grid, Uniform) or quant.grid.bits > 8 or quant.grid.signed is None:
        return "its input is quantized to something else than whole numbers of one step"
    if not isinstance(quant.grain, PerToken) or quant.scale.keeps != "nothing" or quant.scale.nested is not None:
        return "the steps of its input are not one a token, measured afresh"
    if getattr(quant.scale, "zero", None) == "offset":
        return "its input has an offset in values, not a zero in codes"
    return packed.why_not(store.grid, store.grain, (store.shape[0], *store.shape[1:]), integers=True)


_SAID: list[bool] = []


def _say() -> None:
    if not _SAID:
        _SAID.append(True)
        warnings.warn("a model on fast kernels is run with a graph, and kernels have no gradient: its layers go the exact way, which dequantizes. "
                      "To serve, run it under torch.no_grad(); to train, this is right", RuntimeWarning, stacklevel=6)
