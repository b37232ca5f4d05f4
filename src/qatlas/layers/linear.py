"""Linear layers: nn.Linear, and Conv1D, the linear of GPT-2 whose weight lies (in, out)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .packed import PackedLinear
from .quantized import Quantized


class QLinear(Quantized, nn.Linear):
    """nn.Linear with quantized numbers.

    >>> import torch; from qatlas.core.scheme import weight; from qatlas.layers.quantized import Slots
    >>> layer = QLinear.of(nn.Linear(64, 8), Slots(weight=weight(4)))
    >>> torch.equal(layer.hard(), layer.quantize().dequantize())
    True
    """

    replaces = nn.Linear

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w, self.bias_in(x))

    def pack(self) -> PackedLinear:
        return PackedLinear.of(self.quantize(), self.bias, self)


class QTransposed(Quantized, Conv1D):
    """transformers' Conv1D with quantized numbers: the master is (in, out), its matrix (out, in)."""

    replaces = Conv1D

    def matrix(self) -> Tensor:
        return self.weight.T

    def unmatrix(self, w: Tensor) -> Tensor:
        return w.T

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w, self.bias_in(x))

    def pack(self) -> PackedLinear:
        return PackedLinear.of(self.quantize(), self.bias, self)
