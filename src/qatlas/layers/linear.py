"""Linear layers: nn.Linear, and Conv1D, the linear of GPT-2 whose weight lies (in, out)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core import again
from .packed import PackedLinear
from .quantized import Quantized


@torch.no_grad()
def pulled(layer: Any, g: Tensor, x: Tensor, w: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of y = x w^T + b: dx = g w, dw = g^T x, db = sum g."""
    rows, seen = g.flatten(0, -2), x.flatten(0, -2)               # (n, out), (n, in)
    dw = torch.mm(rows.T, seen, out=again.empty(w, moment=True))
    return (rows @ w).unflatten(0, x.shape[:-1]) if wanted else None, dw, None if layer.bias is None else rows.sum(0)


class QLinear(Quantized, nn.Linear):
    """nn.Linear with quantized numbers.

    >>> import torch; from qatlas.core.scheme import weight; from qatlas.layers.quantized import Slots
    >>> layer = QLinear.of(nn.Linear(64, 8), Slots(weight=weight(4)))
    >>> torch.equal(layer.hard(), layer.quantize().dequantize())
    True
    """

    replaces = nn.Linear
    pulled = pulled

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w, self.bias_in(x))

    def pack(self) -> PackedLinear:
        return PackedLinear.of(self.quantize(), self.bias, self)


class QTransposed(Quantized, Conv1D):
    """transformers' Conv1D with quantized numbers: the master is (in, out), its matrix (out, in)."""

    replaces = Conv1D
    pulled = pulled

    def matrix(self) -> Tensor:
        return self.master.T

    def unmatrix(self, w: Tensor) -> Tensor:
        return w.T

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w, self.bias_in(x))

    def pack(self) -> PackedLinear:
        return PackedLinear.of(self.quantize(), self.bias, self)
