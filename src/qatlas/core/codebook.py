"""Codebook: a grid whose values are a given table, in units of one step.

Uniform steps are the best levels for nothing in particular; weights are near to normal, and levels that stand closer around zero lose less for the
same bits. A table says such levels one by one. The code of a value is its index in the table, which ascends.

    u -> the nearest entry; a place exactly between two goes to the upper one (llama.cpp's rule for IQ4_NL, so that its packer and ours agree)

    IQ4_NL     16 integers between -127 and 113, from llama.cpp. No zero: the nearest to it is 1, and the table is lopsided
    NF4        16 values between -1 and 1 with a zero, equally probable under a normal distribution (QLoRA, arXiv 2305.14314)

The step of IQ4_NL is fp16 in groups of 32 (target gguf:iq4_nl). NF4 has no portable format here; it is for comparison, and for full-precision files.
Sources of the tables: ggml-common.h of llama.cpp (kvalues_iq4nl), as the gguf package 0.19.0 reads them; appendix E of QLoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .error import QuantError
from .grid import Grid, nought


@dataclass(frozen=True)
class Codebook(Grid):
    """The values of `table`: 2 to 256 fp32 numbers, ascending, with zero among them or between the first and the last. They are kept rounded to fp32.

    >>> Codebook((-1.0, 0.0, 3.0)).snap(torch.tensor([-0.5, 1.4, 1.5, 9.0]))
    tensor([0., 0., 3., 3.])
    """

    table: tuple[float, ...]

    def __post_init__(self) -> None:
        try:
            values = torch.tensor([float(value) for value in self.table], dtype=torch.float64, device="cpu").float()
        except (TypeError, ValueError):
            raise QuantError(f"Codebook takes a tuple of numbers, not {self.table!r}") from None
        if not 2 <= len(values) <= 256:
            raise QuantError(f"Codebook takes 2 to 256 values, not {len(values)}: a code has at most 8 bits")
        if not bool(values.isfinite().all()) or not bool((values.diff() > 0).all()):
            raise QuantError(f"the values of a Codebook are finite and ascend, each once in fp32: {self.table!r} are not; write tuple(sorted(...))")
        if values[0] > 0 or values[-1] < 0:
            raise QuantError(f"a Codebook reaches from zero or below to zero or above, since a step scales it around zero: {self.table!r} does not")
        object.__setattr__(self, "table", tuple((values + 0.0).tolist()))

    @property
    def bits(self) -> int:
        return (len(self.table) - 1).bit_length()

    @property
    def low(self) -> float:
        return self.table[0]

    @property
    def high(self) -> float:
        return self.table[-1]

    @property
    def count(self) -> int:
        return len(self.table)

    def snap(self, u: Tensor) -> Tensor:
        return _table(self.table, u.dtype, u.device)[self._index(u)].add_(nought(u))

    def encode(self, v: Tensor) -> Tensor:
        return self._codes(self._index(v))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return _table(self.table, dtype, codes.device)[codes.long()]

    def _index(self, u: Tensor) -> Tensor:
        """How many edges lie at or below each place, which is the index of the nearest value."""
        wide = u if u.dtype in (torch.float32, torch.float64) else u.float()
        return torch.bucketize(wide.contiguous(), _edges(self.table, wide.dtype, u.device), right=True)


@lru_cache(64)
def _table(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(table, dtype=torch.float64, device=device).to(dtype)


@lru_cache(64)
def _edges(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The smallest number of the type from which on the upper of two neighbours is the nearest: the middle, rounded up. (The middle of two fp32
    numbers is exact in fp64, and mostly not in fp32.)"""
    values = torch.tensor(table, dtype=torch.float64, device=device)
    middle = (values[1:] + values[:-1]) / 2
    edges = middle.to(dtype)
    return torch.where(edges.double() < middle, torch.nextafter(edges, torch.full_like(edges, math.inf)), edges)


IQ4_NL = Codebook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
NF4 = Codebook((-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
                0.5626170039176941, 0.7229568362236023, 1.0))
