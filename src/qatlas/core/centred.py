"""Centred: the places of x are those of x minus its mean, the scale is that of x itself. Binary weights: s sign(w - mean w), s = mean|w|.

Sources: BiT (arXiv 2205.13016), BitNet of one bit (2310.11453). What is subtracted is deaf: x hears its estimator and nothing through the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .qtensor import QTensor
from .quantizer import Known, Quant, Quantizer, working


@dataclass(frozen=True)
class Centred(Quant):
    """A Quant whose places are those of x minus its mean. whole: the mean is that of the whole tensor, also where a row has a scale of its own.

    >>> from qatlas.core.grid import Sign; from qatlas.core.scale import AbsMean
    >>> Centred(Sign(), scale=AbsMean()).hard(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3., -3.,  3.]])
    """

    whole: bool = False

    def build(self) -> Centring:
        return Centring(self)

    def quantize(self, x: Tensor) -> QTensor:
        return self.build().quantize(x)

    def hard(self, x: Tensor) -> Tensor:
        return self.build().hard(x)


class Centring(Quantizer):
    """The module of `Centred`: a shift of the places by -mean(x) / s."""

    quant: Centred

    def centre(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """x, and a shift in steps (an adapter's) or None -> the whole shift."""
        with torch.no_grad():
            view = self.quant.grain.view(working(x))
            mean = view.mean() if self.quant.whole else view.mean(-1, keepdim=True)
            middle = (-mean / self.quant.scale.cast(self.place(view).s)).expand_as(view)
            middle = self.quant.grain.back(middle, x.shape)
        return middle if shift is None else shift + middle

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        return super().forward(x, self.centre(x, shift), known) if self.on else x

    def known(self, x: Tensor, shift: Tensor | None = None, into: Tensor | None = None) -> Known:
        return super().known(x, self.centre(x, shift), into)

    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        return super().quantize(x, self.centre(x, shift))
