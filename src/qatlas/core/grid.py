"""Grid: the values that a tensor may take, in units of one step.

A grid knows three things about a number u (a place, in steps): the nearest allowed value `v = snap(u)`; the unsigned code under which v is stored,
`encode(v)` in [0, 2^bits); and `decode`, its inverse. It knows nothing of scales, gradients or tensors' shapes, so it is elementwise and pure.

    grid                 values                                     code
    Uniform(4)           -8 ... 7                                   v + 8
    Uniform(4, False)    0 ... 15                                   v
    HalfStep(2)          -1.5 -0.5 0.5 1.5                          v + 1.5
    Stretched(4)         -3/4 -1/4 1/4 3/4, clipped at 0.99         (v + 3/4) * 2
    Ternary()            -1 0 1                                     v + 1
    Sign()               -1 1                                       (v + 1) / 2

Equal steps all of them; small floating-point numbers are in floats.py, given tables in codebook.py.

`low` and `high` are the end values. `reach` is the interval of u that counts as inside: outside it the value no longer moves with u. For most grids
reach and ends agree; half-integer grids reach half a step further. Rounding is half to even, as torch.round; negative zero is never a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .error import QuantError
from .gate import gate
from .noun import Noun


@dataclass(frozen=True)
class Grid(Noun):
    """The interface. Subclasses give `bits`, `low`, `high`, `snap`, `encode`, `decode`."""

    if TYPE_CHECKING:

        @property
        def bits(self) -> int:
            """Bits of one stored code; a field of some grids, a fact of others."""

    @property
    def low(self) -> float:
        """The lowest value, in steps."""
        raise NotImplementedError

    @property
    def high(self) -> float:
        """The highest value, in steps."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(2**self.bits)

    @property
    def reach(self) -> tuple[float, float]:
        """The interval of u inside which the value follows u."""
        return self.low, self.high

    @property
    def top(self) -> int:
        """Qp of LSQ's gradient factor: the highest integer, at least 1."""
        return max(round(self.high), 1)

    def snap(self, u: Tensor) -> Tensor:
        """The nearest allowed value of each place; same shape and dtype. NaN stays NaN."""
        raise NotImplementedError

    def encode(self, v: Tensor) -> Tensor:
        """Values -> unsigned codes: uint8 up to 8 bits, else int32."""
        raise NotImplementedError

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes -> values."""
        raise NotImplementedError

    def inside(self, u: Tensor, margin: float = 0.0) -> Tensor:
        """Where the value follows u: low - margin <= u <= high + margin, a bool tensor."""
        low, high = self.reach
        return (u >= low - margin) & (u <= high + margin)

    def passes(self, g: Tensor, u: Tensor, margin: float = 0.0) -> Tensor:
        """g where u is inside, else 0."""
        low, high = self.reach
        return gate(g, u, low - margin, high + margin)

    def values(self) -> Tensor:
        """All values, ascending."""
        return self.decode(torch.arange(self.count))

    def _codes(self, codes: Tensor) -> Tensor:
        return codes.to(torch.uint8 if self.bits <= 8 else torch.int32)


@dataclass(frozen=True)
class Uniform(Grid):
    """The integers: signed -2^(b-1) .. 2^(b-1)-1, or unsigned 0 .. 2^b-1.

    narrow drops the lowest signed value, so that the grid is symmetric. signed=None leaves the choice to calibration (see Quantizer.settle).

    >>> Uniform(2).values()
    tensor([-2., -1.,  0.,  1.])
    """

    bits: int
    signed: bool | None = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 16):
            raise QuantError(f"Uniform takes 1 to 16 whole bits, not {self.bits!r}; for 1.58 bits write Ternary(), for 1 bit Sign()")

    @property
    def low(self) -> float:
        return float(-(2 ** (self.bits - 1)) + self.narrow) if self.signed is not False else 0.0

    @property
    def high(self) -> float:
        return float(2 ** (self.bits - 1) - 1) if self.signed is not False else float(2**self.bits - 1)

    @property
    def count(self) -> int:
        return int(self.high - self.low) + 1

    def snap(self, u: Tensor) -> Tensor:
        return u.round().clamp_(self.low, self.high).add_(0.0)

    def inside(self, u: Tensor, margin: float = 0.0) -> Tensor:
        """As everywhere; with margin 0.5 where rounding alone lands on the grid, ties as rounding breaks them (7.5 -> 8 is outside of 4 bits)."""
        return super().inside(u.round()) if margin == 0.5 else super().inside(u, margin)

    def passes(self, g: Tensor, u: Tensor, margin: float = 0.0) -> Tensor:
        return super().passes(g, u.round()) if margin == 0.5 else super().passes(g, u, margin)

    def encode(self, v: Tensor) -> Tensor:
        return self._codes(v - (self.low - self.narrow))          # a narrow grid keeps the code of the full one

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) + (self.low - self.narrow)

    def values(self) -> Tensor:
        return torch.arange(self.low, self.high + 1)


def nought(u: Tensor) -> Tensor:
    """0 for each number, NaN for each NaN: adding it keeps a NaN and takes the sign off a zero. (torch.where would cost several times as much.)"""
    return u.clamp(-1, 1).mul_(0.0).abs_()


@dataclass(frozen=True)
class HalfStep(Grid):
    """Half-integers, symmetric and without zero: +-0.5, +-1.5, ... +-(2^(b-1) - 0.5). It reaches +-2^(b-1).

    Source: StatsQ (OFQ, arXiv 2302.02210), ParetoQ at 2 bits up to a factor. Ties round to the even integer below the half.

    >>> HalfStep(2).values()
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """

    bits: int

    @property
    def low(self) -> float:
        return 0.5 - 2 ** (self.bits - 1)

    @property
    def high(self) -> float:
        return 2 ** (self.bits - 1) - 0.5

    @property
    def reach(self) -> tuple[float, float]:
        return float(-(2 ** (self.bits - 1))), float(2 ** (self.bits - 1))

    def snap(self, u: Tensor) -> Tensor:
        return ((u - 0.5).round() + 0.5).clamp(self.low, self.high)

    def encode(self, v: Tensor) -> Tensor:
        return self._codes(v - self.low)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) + self.low


@dataclass(frozen=True)
class Stretched(Grid):
    """`levels` equal bins over [-1, 1], each represented by its middle: the scale is a clip value, not a step.

    With n = levels / 2: v = (round(clamp(u, +-0.99) n - shift) + shift) / n, shift 0.5 for an even number of levels and 0 for an odd one.
    Source: SEQ of ParetoQ (arXiv 2502.02631, official code; the 0.99 is only in the code). levels=3 is its 1.58 bits.

    >>> Stretched(3).values()
    tensor([-0.6667,  0.0000,  0.6667])
    """

    levels: int
    clip: float = 0.99

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise QuantError(f"Stretched needs at least 2 levels, not {self.levels}")
        if not 1 - 2 / self.levels < self.clip < 1:
            raise QuantError(f"Stretched({self.levels}) with clip {self.clip} never reaches its last level, or rounds beyond it; "
                             f"take a clip between {1 - 2 / self.levels:.4g} and 1")

    @property
    def bits(self) -> int:
        return (self.levels - 1).bit_length()

    @property
    def shift(self) -> float:
        return 0.5 if self.levels % 2 == 0 else 0.0

    @property
    def low(self) -> float:
        return -self.high

    @property
    def high(self) -> float:
        return (self.levels - 1) / self.levels

    @property
    def count(self) -> int:
        return self.levels

    @property
    def reach(self) -> tuple[float, float]:
        return -self.clip, self.clip

    @property
    def top(self) -> int:
        return max(self.levels // 2 - 1, 1)                       # that of the integers with as many levels, as in ParetoQ's code

    def snap(self, u: Tensor) -> Tensor:
        n = self.levels / 2
        return ((u.clamp(-self.clip, self.clip) * n - self.shift).round() + self.shift) / n + 0.0

    def encode(self, v: Tensor) -> Tensor:
        return self._codes((v * (self.levels / 2) + (self.levels - 1) / 2).round())

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (codes.to(dtype) - (self.levels - 1) / 2) / (self.levels / 2)


@dataclass(frozen=True)
class Ternary(Grid):
    """-1, 0, 1. |u| above `threshold` is not zero; a tie is zero.

    threshold 0.5 is round-and-clip (BitNet b1.58, LSQ); 0.7 with the mean as scale and `refit` is TWN (arXiv 1605.04711).
    bits is 2, as it is stored plainly; the information is 1.58.

    >>> Ternary().snap(torch.tensor([-0.6, -0.5, 0.2, 3.0]))
    tensor([-1.,  0.,  0.,  1.])
    """

    threshold: float = 0.5
    bits: ClassVar[int] = 2
    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0

    @property
    def count(self) -> int:
        return 3

    def snap(self, u: Tensor) -> Tensor:
        return F.hardshrink(u, self.threshold).sign_().add_(nought(u))

    def encode(self, v: Tensor) -> Tensor:
        return self._codes(v + 1)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) - 1


@dataclass(frozen=True)
class Sign(Grid):
    """-1 and 1. Zero becomes +1: one bit has no third value (several official codes return 0 there, which no binary format can store).

    >>> Sign().snap(torch.tensor([-0.1, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """

    bits: ClassVar[int] = 1
    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0

    def snap(self, u: Tensor) -> Tensor:
        return torch.copysign(u.new_ones(()), u + 0.0).add_(nought(u))    # + 0.0: negative zero is zero

    def encode(self, v: Tensor) -> Tensor:
        return self._codes(v > 0)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) * 2 - 1
