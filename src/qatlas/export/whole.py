"""Whole numbers: which grids are integers of so many bits, and how many inputs share a step. Formats that store an integer and a step ask both.

With a power of two k, all k v of a grid may be integers; s v = (s / k) (k v) is then the same fp32 number. A grid that does not lie around zero
(0 ... 15) is moved by m, its zero with it: v - z does not change.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..core.grain import Grain
from ..core.grid import Grid
from ..core.qtensor import QTensor

TIMES = tuple(2**i for i in range(8))


def integers(grid: Grid, bits: int) -> tuple[int, int] | None:
    """The power of two k and the shift m for which all k v - m are signed integers of so many bits; None where there are none.

    >>> from qatlas.core.grid import HalfStep, Uniform
    >>> integers(Uniform(4), 4), integers(Uniform(4, False), 4), integers(HalfStep(2), 3), integers(HalfStep(2), 2)
    ((1, 0), (1, 8), (2, 0), None)
    """
    values, half = grid.values(), 2 ** (bits - 1)
    for k in TIMES:
        v = values * k
        low, high = int(v.min()), int(v.max())
        if bool((v.round() == v).all()) and high - low < 2 * half:
            return k, 0 if low >= -half and high < half else low + half
    return None


@lru_cache(maxsize=256)
def sharing(grain: Grain, shape: tuple[int, ...]) -> int | None:
    """How many neighbours along the inputs share a step: all of them for one step a row or coarser; None where that is no one number.

    >>> from qatlas.core.grain import Block, Group, PerTensor
    >>> sharing(Group(32), (4, 64)), sharing(PerTensor(), (4, 64)), sharing(Block(2, 16), (4, 64))
    (32, 64, 16)
    """
    groups = grain.scale_shape(shape)
    row = spread(grain, torch.arange(math.prod(groups), dtype=torch.int32).reshape(groups), shape)     # (out, in)
    ends = torch.nonzero(row[0, 1:] != row[0, :-1])
    size = int(ends[0]) + 1 if len(ends) else shape[1]
    each = row.unflatten(-1, (-1, size)) if shape[1] % size == 0 else None
    return size if each is not None and bool((each == each[..., :1]).all()) else None


def spread(grain: Grain, steps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What belongs to each step, for each element: (the grain's) -> (out, in)."""
    return grain.back(steps.unsqueeze(-1).expand(grain.view(torch.empty(shape, device="meta")).shape), shape)


def each(tensor: QTensor, steps: Tensor, size: int) -> Tensor:
    """One value for each `size` inputs: (the grain's) -> (out, in / size)."""
    return spread(tensor.grain, steps, tuple(tensor.shape))[:, ::size].contiguous().cpu()
