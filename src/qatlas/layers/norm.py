"""Norm: a root-mean-square norm in front of a quantized linear layer, as a part of the layer. BitNet's SubLN (arXiv 2310.11453, 2504.12285).

    y = W_hat Q(g * x / sqrt(mean x^2 + eps))

An unmodified model has no place for another norm. So it stands inside the layer, before its transform and input quantizer, and goes where the layer
goes: through packing, into the file, and back. Its gain g starts at 1 and learns like any norm's; it is computed in fp32.
An exported file of a Llama has no place for it either: `checkpoint` refuses, and `quantize` with a target does so before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.noun import Noun
from ..core.quantizer import working


@dataclass(frozen=True)
class Norm(Noun):
    """What a rule says: a norm over the inputs of a linear layer, and its epsilon."""

    eps: float = 1e-5

    def build(self, weight: Tensor) -> Rms:
        """weight (out, in) -> the norm of its inputs.

        Raises:
            QuantError: a weight that is no matrix.
        """
        if weight.dim() != 2:
            raise QuantError(f"a norm stands in front of linear layers only, not of a weight of shape {tuple(weight.shape)}")
        return Rms(weight.shape[1], eps=self.eps, device=weight.device)


class Rms(nn.RMSNorm):
    """(..., in) -> (..., in) in the type of x, computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        x32 = working(x)
        gain = None if self.weight is None else self.weight.to(x32.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x32, self.normalized_shape, gain, self.eps).to(x.dtype)
