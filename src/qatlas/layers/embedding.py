"""Embeddings: the table is quantized, one row a channel; the ids that come in are not numbers to quantize.

Where no row's numbers depend on another row, and fewer rows are asked for than there are, only those are quantized: the same values and gradients.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.grain import Group, PerChannel
from ..core.quantizer import Quantizer
from .packed import PackedEmbedding
from .quantized import Quantized


class QEmbedding(Quantized, nn.Embedding):
    """nn.Embedding with a quantized table (rows, width)."""

    replaces = nn.Embedding
    bias = None

    def _set(self, slots, peak) -> None:  # type: ignore[no-untyped-def]
        if slots.input is not None or slots.transform is not None or slots.norm is not None:
            raise QuantError("an embedding has ids as input: its rule takes weight (and output), not input, transform or norm")
        if self.max_norm is not None or self.sparse:
            raise QuantError("an embedding with max_norm would write into the quantized table, and sparse gradients do not pass a quantizer; "
                             "set max_norm=None and sparse=False, or keep it in full precision")
        super()._set(slots, peak)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.embedding(x, w, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)

    def multiply(self, q: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        if not (self.by_row and quantizer.on and q.numel() < self.num_embeddings):  # type: ignore[union-attr]
            return super().multiply(q)
        return quantizer(F.embedding(q.flatten(), self.weight, self.padding_idx)).unflatten(0, q.shape)  # type: ignore[misc]

    @property
    def by_row(self) -> bool:
        """Whether a row can be quantized without the others: a scale of its own that is measured afresh and stored as it is (nested scales may share
        a step), nothing kept, nothing beside."""
        quantizer = self.weight_quantizer
        if type(quantizer) is not Quantizer or self.adapter is not None or self.keep != "each" or self.scale_grad_by_freq:
            return False
        quant = quantizer.quant
        return quant.scale.keeps == "nothing" and quant.scale.nested is None and (quant.grain == PerChannel() or isinstance(quant.grain, Group))

    def pack(self) -> PackedEmbedding:
        return PackedEmbedding.of(self.quantize(), None, self)
