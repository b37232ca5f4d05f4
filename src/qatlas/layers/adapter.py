"""Adapter: a small trainable part inside a quantized weight or beside it, in one of four places.

    inside   w + d         before the quantizer, in the weight's own space. Merges exactly: the same codes come out of w + d.
    shift    u + d         inside the grid, in steps (LR-QAT's place). Merges exactly: the master becomes the values that the layer computes with.
    after    Q(w) + d      after dequantization. No low-bit grid holds the sum: it does not merge, it is exported beside.
    beside   y + f(x, q)   another branch of the layer, given the input and the quantized input. It does not merge either.

An `AdapterSpec` is the value (it goes into rules and JSON); `build` makes the module for one weight. `Lora` is the first user: d = (alpha / rank) B A
with B zero at the start, so that a fresh adapter moves nothing, in any of the four places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.noun import Noun

if TYPE_CHECKING:
    from .quantized import Quantized


class Adapter(nn.Module):
    """The four places, each of them empty by default. merges: all it does is in the codes, so that nothing of it is left in a packed layer."""

    merges: bool = False

    def inside(self, w: Tensor) -> Tensor:
        """(out, in) -> (out, in), before the transform and the quantizer."""
        return w

    def shift(self, w: Tensor) -> Tensor | None:
        """(out, in) -> what to add to the place, in steps, or None."""
        return None

    def after(self, w: Tensor) -> Tensor:
        """(out, in) -> (out, in), after dequantization."""
        return w

    def beside(self, x: Tensor, q: Tensor, y: Tensor) -> Tensor:
        """x (..., in) as it came, q (..., in) as it was quantized, y (..., out) -> (..., out)."""
        return y

    def merged(self, w: Tensor, layer: Quantized) -> Tensor:
        """The master (out, in) that makes the adapter superfluous, leaving the codes as they are.

        Raises:
            QuantError: in a place that cannot be merged into the grid.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AdapterSpec(Noun):
    """The interface."""

    def build(self, weight: Tensor) -> Adapter:
        """weight (out, in) -> the adapter of this layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lora(AdapterSpec):
    """LoRA (arXiv 2106.09685): rank, alpha (the update is multiplied by alpha / rank), and the place: inside, shift, after or beside."""

    rank: int = 8
    alpha: float = 16.0
    place: str = "inside"

    def __post_init__(self) -> None:
        if self.place not in ("inside", "shift", "after", "beside"):
            raise QuantError(f"Lora(place={self.place!r}): the places are inside, shift, after, beside")

    def build(self, weight: Tensor) -> Adapter:
        return _Lora(self, weight)


class _Lora(Adapter):
    def __init__(self, spec: Lora, weight: Tensor) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise QuantError(f"Lora adapts matrices, not a weight of shape {tuple(weight.shape)}")
        self.spec, self.merges = spec, spec.place in ("inside", "shift")
        self.a = nn.Parameter(torch.empty(spec.rank, weight.shape[1], device=weight.device))       # (rank, in)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], spec.rank, device=weight.device))       # (out, rank)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def update(self) -> Tensor:
        """(out, in)."""
        return self.b @ self.a * (self.spec.alpha / self.spec.rank)

    def inside(self, w: Tensor) -> Tensor:
        return w + self.update() if self.spec.place == "inside" else w

    def shift(self, w: Tensor) -> Tensor | None:
        return self.update() if self.spec.place == "shift" else None

    def after(self, w: Tensor) -> Tensor:
        return w + self.update() if self.spec.place == "after" else w

    def beside(self, x: Tensor, q: Tensor, y: Tensor) -> Tensor:
        if self.spec.place != "beside":
            return y
        return y + (x @ self.a.T.to(x.dtype) @ self.b.T.to(x.dtype) * (self.spec.alpha / self.spec.rank)).to(y.dtype)

    def merged(self, w: Tensor, layer: Quantized) -> Tensor:
        if self.spec.place == "inside":
            return self.inside(w)
        if self.spec.place == "shift":
            return layer.hard()
        raise QuantError(f"an adapter {self.spec.place!r} does not merge: no low-bit grid holds the sum. "
                         "Train with place='inside' or 'shift' to merge, or export it beside the quantized weight")
