"""Convolutions. The weight (out, in / groups, kernel ...) is quantized per output channel unless its Quant says otherwise; a group runs over the
flattened rest. Padding modes are torch's own."""

from __future__ import annotations

from torch import Tensor, nn

from .packed import PackedConv1d, PackedConv2d
from .quantized import Quantized


class QConv1d(Quantized, nn.Conv1d):
    """nn.Conv1d with quantized numbers."""

    replaces = nn.Conv1d

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return self._conv_forward(x, w, self.bias_in(x))

    def pack(self) -> PackedConv1d:
        return PackedConv1d.of(self.quantize(), self.bias, self)


class QConv2d(Quantized, nn.Conv2d):
    """nn.Conv2d with quantized numbers."""

    replaces = nn.Conv2d

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return self._conv_forward(x, w, self.bias_in(x))

    def pack(self) -> PackedConv2d:
        return PackedConv2d.of(self.quantize(), self.bias, self)
