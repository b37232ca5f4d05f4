"""Rows: one matrix of several, each with numbers of its own. GPT-2's `c_attn` holds query, key and value one below the other, as equal parts.

The parts are quantized each by itself (per tensor means one scale for query, one for key, one for value) and stand in one weight again. They pack as
one matrix where they can be told as one: one grid, and a grain that runs along rows; one scale a part becomes the same scale for each of its rows,
with the same values bit for bit. Parts on different grids, or a part in full precision, train but do not pack: no format of ours holds such a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.grain import PerChannel, PerTensor
from ..core.noun import Noun
from ..core.qtensor import QTensor
from ..core.quantizer import Known, Quant, Quantizer


@dataclass(frozen=True)
class Rows(Noun):
    """Quants of equal parts of the rows, None for full precision.

    >>> from qatlas.core.scheme import weight
    >>> Rows((weight(4), weight(8))).bits
    6.0
    """

    parts: tuple[Quant | None, ...] = (None, None, None)

    @property
    def bits(self) -> float:
        """Mean bits of a stored code."""
        return sum(32 if part is None else part.bits for part in self.parts) / len(self.parts)

    @property
    def label(self) -> str:
        """In a few words."""
        return " / ".join("full" if part is None else part.label for part in self.parts)

    def build(self) -> RowsQuantizer:
        """The module."""
        return RowsQuantizer(self)


class RowsQuantizer(nn.Module):
    """A Quantizer for each part; answers as one Quantizer does, to the weight of a layer."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Identity() if part is None else part.build() for part in rows.parts)

    @property
    def on(self) -> bool:
        """Whether every part quantizes."""
        return all(part.on for part in self.parts if isinstance(part, Quantizer))

    def _cut(self, *tensors: Tensor | None) -> Any:
        """(part, its rows of each tensor), part by part."""
        n = len(self.parts)
        if tensors[0] is not None and tensors[0].shape[0] % n:
            raise QuantError(f"{tensors[0].shape[0]} rows are not {n} equal parts")
        return zip(self.parts, *((None,) * n if x is None else x.chunk(n) for x in tensors), strict=True)

    def initialise(self, x: Tensor) -> RowsQuantizer:
        """As Quantizer.initialise."""
        for part, rows in self._cut(x):
            if isinstance(part, Quantizer):
                part.initialise(rows)
        return self

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        """(rows, ...) -> the same shape."""
        values = None if known is None else known.value
        places: Any = (None,) * len(self.parts) if known is None else known.place
        return torch.cat([part(rows, move, None if value is None else Known(value, place)) if isinstance(part, Quantizer) else rows
                          for (part, rows, move, value), place in zip(self._cut(x, shift, values), places, strict=True)])

    @torch.no_grad()
    def known(self, x: Tensor, shift: Tensor | None = None, into: Tensor | None = None) -> Known:
        """As Quantizer.known; the place is that of each part."""
        into = torch.empty_like(x) if into is None else into
        each = [part.known(rows, move, there) if isinstance(part, Quantizer) else Known(there.copy_(rows), None)  # type: ignore[arg-type]
                for part, rows, move, there in self._cut(x, shift, into)]
        return Known(into, tuple(one.place for one in each))  # type: ignore[arg-type]

    @torch.no_grad()
    def hard(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """The values of `forward`, without a graph."""
        return self.forward(x, shift)

    @torch.no_grad()
    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        """One QTensor of all rows.

        Raises:
            QuantError: parts that no single QTensor holds.
        """
        if not all(isinstance(part, Quantizer) for part in self.parts):
            raise QuantError("a part of the rows stays in full precision: such a matrix has no codes. Give every part a grid to pack it")
        each = [_by_row(part.quantize(rows, move)) for part, rows, move in self._cut(x, shift)]
        first = each[0]
        for q in each[1:]:
            if (q.grid, q.grain, q.scale_dtype) != (first.grid, first.grain, first.scale_dtype) \
                    or any(isinstance(level, QTensor) for t in each for level in (t.scale, t.offset)) \
                    or (q.zero is None, q.offset is None) != (first.zero is None, first.offset is None):
                raise QuantError(f"the parts of the rows differ in more than their scales ({first.grid} {first.grain} and {q.grid} {q.grain}): they "
                                 "train, but do not pack as one matrix. Give them one grid and one grain")
        zero, offset = (None if getattr(first, name) is None else torch.cat([getattr(q, name) for q in each]) for name in ("zero", "offset"))
        return QTensor(torch.cat([q.codes for q in each]), torch.cat([q.steps for q in each]), zero, offset, first.grid, first.grain,
                       first.scale_dtype)


def _by_row(q: QTensor) -> QTensor:
    """One scale a part, told as one a row."""
    if q.grain != PerTensor() or isinstance(q.scale, QTensor) or isinstance(q.offset, QTensor):
        return q
    n = q.shape[0]
    zero, offset = (None if t is None else t.expand(n) for t in (q.zero, q.offset))
    return QTensor(q.codes, q.scale.expand(n), zero, offset, q.grid, PerChannel(), q.scale_dtype)
