"""Embeddings: the table is quantized, one row a channel; the ids that come in are not numbers to quantize."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.error import QuantError
from .packed import PackedEmbedding
from .quantized import Quantized


class QEmbedding(Quantized, nn.Embedding):
    """nn.Embedding with a quantized table (rows, width)."""

    replaces = nn.Embedding

    def _set(self, slots, peak) -> None:  # type: ignore[no-untyped-def]
        if slots.input is not None or slots.transform is not None or slots.norm is not None:
            raise QuantError("an embedding has ids as input: its rule takes weight (and output), not input, transform or norm")
        if self.max_norm is not None or self.sparse:
            raise QuantError("an embedding with max_norm would write into the quantized table, and sparse gradients do not pass a quantizer; "
                             "set max_norm=None and sparse=False, or keep it in full precision")
        super()._set(slots, peak)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.embedding(x, w, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)

    def pack(self) -> PackedEmbedding:
        return PackedEmbedding.of(self.quantize(), None, self)
