"""Products with packed weights on CPU: y = x W^T + b straight from the codes, which stay as they lie (also in a mapped file).

    linear(x, w)                       x in floats. Each weight is made in a register: as `dequantize`, then matmul, up to the order of sums
    linear_int8(codes, steps, zero, w) x = step (q - zx) with int8 codes q, a step (and a zero) a token, as core quantizes tokens

Integer sums are exact, and the rest has one order, on every machine and with any number of threads; `exact` is the same in torch:

    D = sum_k v_k q_k of a group            a whole number (of halves, quarters ... of a step: HalfStep, Stretched)
    T = T + s D       s (D - z X)       s D + m X           X = sum_k q_k; groups one after another, fp32
    y = step T        step (T - zx U)                       U = sum of the row of W, by the same line; then + bias

Floats: |y - exact y| <= 2^-24 (n + 16) sum_k |x_k| s (|v_k| + |z|) (+ |m x_k|) for n inputs, and a NaN or an infinity comes out where it does of
`dequantize`: with such x, or one beyond 1e30, each weight is made whole before it is multiplied (slower).

Covered (`why_not` says what is not): weights of 1, 2, 3, 4, 8 bits by tensor, channel or group, where a group ends with a dword (1 and 3 bits: a
multiple of 32 inputs; 2: 16; 4: 8; 8: 4) or is the whole row; grids of equal steps, and with float x any grid of up to 16 values. `dense` packs
ternary codes anew, five to a byte: 1.6 bits a weight. More than 64 tokens go through in portions of 64.

Both products are operators of torch (torch.ops.qatlas.packed_linear, ..._int8), so compile and autocast know them. They have no gradient: where x
needs one, `linear` dequantizes. So it does where the library is missing (library.py says so).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.error import QuantError
from ..core.grain import Grain, Group, PerChannel, PerTensor
from ..core.grid import Grid
from ..core.qtensor import QTensor, pack_bits, unpack_bits
from . import operators
from .library import library

DENSE = 16                                                        # QN_TERNARY of native.h
UNIT = {1: 32, 2: 16, 3: 32, 4: 8, 8: 4}                          # codes of a dword (3 bits: of three), with which a group must end
Numbers = tuple[int, int, float, float, float, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed weight (rows, cols) as the kernels take it. codes: uint8 (rows, bytes), contiguous, of any memory; scale, zero, offset: fp32, as a
    QTensor has them. width: bits of a code, or DENSE."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    grid: Grid
    grain: Grain
    shape: tuple[int, int]
    width: int
    conf: tuple[int, ...] = field(repr=False)                     # what the operators are told: rows, cols, group, groups, width, shift, whole
    reals: tuple[float, ...] = field(repr=False)                  # part, unit, low
    table: Tensor | None = field(repr=False)
    native: bool = field(repr=False)                              # whether the library is there

    @classmethod
    def of(cls, q: QTensor) -> Matrix:
        """From a QTensor; its codes are packed, which copies them."""
        return cls.from_parts(pack_bits(q.codes, q.bits), q.steps, q.zero, q.offsets, q.grid, q.grain, tuple(q.shape))

    @classmethod
    def from_parts(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, grid: Grid, grain: Grain,
                   shape: tuple[int, ...]) -> Matrix:
        """From the buffers of a packed layer; contiguous codes stay where they are.

        Raises:
            QuantError: what no kernel covers (`why_not`), or tensors that do not belong together.
        """
        if reason := why_not(grid, grain, shape):
            raise QuantError(f"no kernel multiplies with this packed weight: {reason}")
        rows, cols = shape
        bits, wanted = int(grid.bits), grain.scale_shape(tuple(shape))
        if codes.dtype != torch.uint8 or tuple(codes.shape) != (rows, -(-cols * bits // 8)) or codes.device.type != "cpu":
            raise QuantError(f"packed codes of a {tuple(shape)} weight of {bits} bits are uint8 ({rows}, {-(-cols * bits // 8)}) on CPU, "
                             f"not {codes.dtype} {tuple(codes.shape)} on {codes.device}")
        for name, t in (("scale", scale), ("zero", zero), ("offset", offset)):
            if t is not None and tuple(t.shape) != wanted:
                raise QuantError(f"the {name} of a {tuple(shape)} weight with {grain} has shape {wanted}, not {tuple(t.shape)}")
        plain = (None if t is None else t.detach().to("cpu", torch.float32).contiguous() for t in (scale, zero, offset))
        s, z, m = plain
        assert s is not None
        group = grain.size if isinstance(grain, Group) else cols
        shift, whole, part, unit, low, values = _numbers(grid)
        table = torch.tensor(values) if values else None
        conf = (rows, cols, group, cols // group if group else 0, bits, shift, whole)
        return cls(codes.contiguous(), s, z, m, grid, grain, (rows, cols), bits, conf, (part, unit, low), table, library() is not None)

    @cached_property
    def sums(self) -> Tensor:
        """U: the sums of the rows, (rows,)."""
        one = torch.ones(1, self.shape[1], dtype=torch.int8)
        return linear_int8(one, torch.ones(1), None, self)[0]

    @property
    def strides(self) -> tuple[int, int]:
        """How far the scales of the next row, and of the next group, are."""
        return (0, 0) if isinstance(self.grain, PerTensor) else (self.conf[3], 1) if isinstance(self.grain, Group) else (1, 0)

    def unpacked(self) -> Tensor:
        """The codes, uint8 (rows, cols)."""
        return unpack_bits(self.codes, self.width, self.shape) if self.width != DENSE else _undigits(self.codes, self.conf)

    def dequantize(self) -> Tensor:
        """The weight, fp32 (rows, cols)."""
        return QTensor(self.unpacked(), self.scale, self.zero, self.offset, self.grid, self.grain).dequantize()

    def nbytes(self) -> int:
        """Bytes that one product reads of it."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero, self.offset) if t is not None)


def why_not(grid: Grid, grain: Grain, shape: tuple[int, ...], integers: bool = False) -> str:
    """Why no kernel multiplies with a weight of this kind ("" if one does); integers: by `linear_int8`."""
    if len(shape) != 2:
        return f"it has {len(shape)} axes, and a matrix has two"
    if not isinstance(grain, PerTensor | PerChannel | Group) or (isinstance(grain, PerChannel) and grain.axis not in (0, -2)):
        return f"its scales serve {grain}; the kernels know PerTensor(), PerChannel() and Group(n)"
    if grid.bits not in UNIT:
        return f"its codes have {grid.bits} bits; the kernels know 1, 2, 3, 4 and 8"
    group = grain.size if isinstance(grain, Group) else shape[1]
    unit = UNIT[int(grid.bits)]
    if group != shape[1] and (group < 1 or group % unit):
        return f"a group of {group} inputs with codes of {grid.bits} bits does not end with a dword; multiples of {unit} do"
    shift, whole, part, *_ = _numbers(grid)
    most = max(abs(whole), abs((2**int(grid.bits) - 1 << shift) + whole)) * 128 * group
    if not part:
        if grid.bits > 4:
            return f"the values of {grid} have no equal steps, and there are more than 16"
        return f"the values of {grid} are no whole numbers of a part of a step, which products of whole numbers need" if integers else ""
    return f"the sums of {group} products may pass 2^31" if integers and most >= 2**31 else ""


@lru_cache(256)
def _numbers(grid: Grid) -> Numbers:
    """(shift, whole, part, unit, low, table): v = ((c << shift) + whole) part = unit c + low = table[c]. part 0: there are no such whole numbers."""
    codes = torch.arange(2 ** int(grid.bits))
    try:
        v = grid.decode(codes)
    except IndexError:                                            # a table that does not use all codes
        v = grid.decode(codes.clamp(max=grid.count - 1))
    table = tuple(v.repeat(16)[:16].tolist()) if grid.bits <= 4 else ()
    unit, low = float(v[1] - v[0]), float(v[0])
    if torch.equal(v, codes * unit + low):
        for parts in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            if (unit * parts, (low * parts).is_integer()) in ((1.0, True), (2.0, True)):
                return int(unit * parts) - 1, int(low * parts), 1 / parts, unit, low, table
    return 0, 0, 0.0, 0.0, 0.0, table


def matrix(q: QTensor) -> Matrix | None:
    """The Matrix of a weight, or None where no kernel covers it; each reason is said once."""
    if reason := why_not(q.grid, q.grain, tuple(q.shape)):
        _say(reason)
        return None
    return Matrix.of(q)


@lru_cache(64)
def _say(reason: str) -> None:
    warnings.warn(f"a packed layer takes the slow path (it dequantizes and multiplies): {reason}", RuntimeWarning, stacklevel=3)


def dense(w: Matrix) -> Matrix:
    """A weight of three values with five codes a byte: 1.6 bits each, and each group (or row) begins with a dword.

    Raises:
        QuantError: codes above 2.
    """
    codes = w.unpacked()
    if w.width != 2 or bool((codes > 2).any()):
        raise QuantError("five codes a byte are for weights of three values, with the codes 0, 1 and 2")
    group = w.conf[2]
    digits = F.pad(codes.view(w.shape[0], -1, group), (0, -group % 20)).flatten(1).unflatten(1, (-1, 5)).int()
    number = (digits * torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)).sum(-1)
    packed = ((number * 256 + 242) // 243 + 128) % 256            # the number as a fraction of 243, rounded up, of a byte; see ops_scalar.h
    conf = (*w.conf[:4], DENSE, *w.conf[5:])
    return Matrix(packed.to(torch.uint8).contiguous(), w.scale, w.zero, w.offset, w.grid, w.grain, w.shape, DENSE, conf, w.reals, w.table, w.native)


def _undigits(packed: Tensor, conf: tuple[int, ...]) -> Tensor:
    rows, cols, group, groups = conf[:4]
    left, digits = (packed.int() + 128) % 256, []
    for _ in range(5):
        digits.append(left * 3 >> 8)
        left = left * 3 & 255
    return torch.stack(digits, -1).to(torch.uint8).view(rows, groups, -1)[..., :group].reshape(rows, cols)


def linear(x: Tensor, w: Matrix, bias: Tensor | None = None, threads: int = 0) -> Tensor:
    """x (..., cols) of any float type -> (..., rows) in the type of x. threads: 0 is torch.get_num_threads().

    Raises:
        QuantError: x of another width, type or device.
    """
    if x.shape[-1:] != (w.shape[1],) or not x.is_floating_point() or x.device.type != "cpu":
        raise QuantError(f"a packed weight {w.shape} takes floats (..., {w.shape[1]}) on CPU, not {x.dtype} {tuple(x.shape)} on {x.device}")
    _fits(bias, w)
    if not w.native or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return F.linear(x, w.dequantize().to(x.dtype), bias if bias is None else bias.to(x.dtype))
    return operators.packed_linear(x, w.codes, w.scale, w.zero, w.offset, bias, w.table, w.conf, w.reals, w.strides, threads)


def linear_int8(codes: Tensor, steps: Tensor, zero: Tensor | None, w: Matrix, bias: Tensor | None = None, threads: int = 0) -> Tensor:
    """codes int8 (..., cols), steps and zero fp32 (...): x = step (code - zero) -> (..., rows), fp32.

    Raises:
        QuantError: tensors of other shapes or types, or a weight without whole numbers.
    """
    if reason := why_not(w.grid, w.grain, w.shape, integers=True):
        raise QuantError(f"no kernel multiplies int8 activations with this packed weight: {reason}")
    if codes.dtype != torch.int8 or codes.shape[-1:] != (w.shape[1],) or codes.device.type != "cpu":
        raise QuantError(f"a packed weight {w.shape} takes int8 (..., {w.shape[1]}) on CPU, not {codes.dtype} {tuple(codes.shape)} on {codes.device}")
    for name, t in (("step", steps), ("zero", zero)):
        if t is not None and t.shape != codes.shape[:-1]:
            raise QuantError(f"codes {tuple(codes.shape)} have one {name} a token, {tuple(codes.shape[:-1])}, not {tuple(t.shape)}")
    _fits(bias, w)
    if not w.native:
        return exact(codes, steps, zero, w, bias)
    sums = w.sums if zero is not None else None
    return operators.packed_linear_int8(codes, steps, zero, w.codes, w.scale, w.zero, w.offset, bias, sums, w.conf, w.reals, w.strides, threads)


def _fits(bias: Tensor | None, w: Matrix) -> None:
    if bias is not None and (tuple(bias.shape) != w.shape[:1] or bias.device.type != "cpu"):
        raise QuantError(f"the bias of a packed weight {w.shape} is ({w.shape[0]},) on CPU, not {tuple(bias.shape)} on {bias.device}")


def exact(codes: Tensor, steps: Tensor, zero: Tensor | None, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """`linear_int8` in torch: whole numbers in int64, then fp32 in the order of this file's head. The reference of tests, and the slow path."""
    rows, cols, group, groups, _, shift, whole = w.conf
    part = w.reals[0]
    q = codes.reshape(-1, cols).long()
    v = (w.unpacked().long() << shift) + whole
    scale, z, m = (None if t is None else t.reshape(-1, 1 if w.strides[1] == 0 else groups).expand(rows, groups) for t in (w.scale, w.zero, w.offset))
    assert scale is not None

    def summed(q: Tensor) -> Tensor:
        total = torch.zeros(len(q), rows)
        for g in range(groups):
            some = slice(g * group, (g + 1) * group)
            d, x = (q[:, some] @ v[:, some].T).float() * part, q[:, some].sum(1, keepdim=True).float()
            d = d if z is None else d - z[:, g] * x
            d = scale[:, g] * d
            total = total + (d if m is None else d + m[:, g] * x)
        return total

    y = summed(q)
    if zero is not None:
        y = y - zero.reshape(-1, 1).float() * summed(torch.ones(1, cols, dtype=torch.long))
    y = steps.reshape(-1, 1).float() * y
    y = y if bias is None else y + bias.float()
    return y.reshape(*codes.shape[:-1], rows)
