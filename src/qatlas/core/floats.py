"""Float: the grid of small floating-point numbers, FP4 to FP8, whose steps grow with the value.

    Float(2, 1)          0 .5 1 1.5 2 3 4 6 and their negatives     sign, exponent, mantissa bits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid


@dataclass(frozen=True)
class Float(Grid):
    """Small floating-point numbers: `exponent` and `mantissa` bits and a sign, no infinities.

    Float(2, 1) is E2M1 (FP4, up to 6); Float(4, 3) is E4M3FN (FP8, up to 448: the all-ones code is NaN and not a value). Rounding half to even.

    >>> Float(2, 1).values()[7:]
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
    """

    exponent: int = 2
    mantissa: int = 1

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def low(self) -> float:
        return -self.high

    @property
    def high(self) -> float:
        top = 2 - 2.0**-self.mantissa
        if (self.exponent, self.mantissa) == (4, 3):
            top -= 2.0**-self.mantissa                            # E4M3FN gives its last code to NaN
        return top * 2.0 ** (2**self.exponent - 1 - self.bias)

    @property
    def count(self) -> int:
        return int(2**self.bits) - (3 if (self.exponent, self.mantissa) == (4, 3) else 1)      # zero has two codes, E4M3FN two NaN

    def _power(self, a: Tensor) -> Tensor:
        """a = m 2^power with 1 <= m < 2; from the subnormals down the power, and with it the step, stays the same."""
        return torch.where(a > 0, torch.frexp(a).exponent - 1, 1 - self.bias).clamp(min=1 - self.bias)

    def snap(self, u: Tensor) -> Tensor:
        a = u.abs().clamp(max=self.high)
        step = torch.ldexp(torch.ones_like(a), self._power(a) - self.mantissa)
        return torch.where(u < 0, -1.0, 1.0).to(u.dtype) * ((a / step).round() * step).clamp(max=self.high) + 0.0

    def encode(self, v: Tensor) -> Tensor:
        a = v.abs()
        power = self._power(a)
        fraction = a / torch.ldexp(torch.ones_like(a), power - self.mantissa)          # [0, 2^(m+1))
        code = (power + self.bias - 1) * 2**self.mantissa + fraction.to(power.dtype)    # the carry of the hidden bit adds one to the exponent
        return self._codes(code + (v < 0) * 2 ** (self.bits - 1))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = codes.to(torch.int32)
        rest = codes % 2 ** (self.bits - 1)
        field, fraction = rest // 2**self.mantissa, (rest % 2**self.mantissa).to(dtype)
        normal = (field > 0).to(dtype)
        power = field.clamp(min=1) - self.bias - self.mantissa
        sign = 1 - 2 * (codes // 2 ** (self.bits - 1)).to(dtype)
        return sign * torch.ldexp(fraction + normal * 2**self.mantissa, power) + 0.0

    def values(self) -> Tensor:
        positive = self.decode(torch.arange(self.count // 2 + 1))
        return torch.cat([-positive[1:].flip(0), positive])
