"""Place: where a tensor sits on its grid, and the way there and back.

    u = x / s + z        or  (x - m) / s          `locate`
    y = s (v - z)        or  s v + m              `decode`
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor sits on its grid: u = x / s + zero, or u = (x - offset) / s. All shaped (..., 1); at most one of zero and offset."""

    s: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def of(cls, scale: Any, zero: Any, offset: Any, dtype: torch.dtype) -> Place:
        """From state without the last axis."""
        return cls(*(None if t is None else t.to(dtype).unsqueeze(-1) for t in (scale, zero, offset)))  # type: ignore[arg-type]


def locate(x: Tensor, place: Place) -> Tensor:
    """u: the place of x on the grid, in steps."""
    if place.zero is not None:
        return x / place.s + place.zero
    return x / place.s if place.offset is None else (x - place.offset) / place.s


def decode(v: Tensor, place: Place) -> Tensor:
    """y: the value that v stands for, in the one order of operations that every reader of ours uses: s (v - z), or s v + m."""
    if place.zero is not None:
        return place.s * (v - place.zero)
    return place.s * v if place.offset is None else place.s * v + place.offset
