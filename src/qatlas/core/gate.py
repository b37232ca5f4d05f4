"""Gate: g where u lies in an interval, 0 elsewhere; in one pass over memory.

Written as `g * ((u >= low) & (u <= high))` it takes four passes, three of them over booleans, for which torch has no fast loops on CPU: ten times the
seconds. torch's backward of hardtanh is this function with the ends left out, so the ends move out by one unit in the last place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gate(g: Tensor, u: Tensor, low: float, high: float) -> Tensor:
    """g where low <= u <= high, else 0. g, u: one shape, fp32 or fp64; the ends are numbers of that type. u = NaN lets g pass.

    >>> gate(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([-1.0, 0.5, 1.001]), -1, 1)
    tensor([5., 6., 0.])
    """
    if torch.compiler.is_compiling():                             # the compiler makes one pass of it
        return torch.where((u >= low) & (u <= high), g, 0.0)
    return between(g, u, -_above(-low, u.dtype), _above(high, u.dtype))


def between(g: Tensor, u: Tensor, low: float, high: float) -> Tensor:
    """g where low < u < high, else 0."""
    return torch.ops.aten.hardtanh_backward(g, u, low, high)      # type: ignore[no-any-return]


def _above(x: float, dtype: torch.dtype) -> float:
    """The next number of the type."""
    if dtype == torch.float64:
        return math.nextafter(x, math.inf)
    if x == 0 or not math.isfinite(x):
        return x or 2.0**-149
    below = x < 0 and math.frexp(x)[0] == -0.5                    # towards zero from a power of two the units are half as long
    return x + 2.0 ** (math.frexp(x)[1] - 24 - below)
