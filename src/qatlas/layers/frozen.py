"""Frozen: how a weight that is not trained itself is kept, in less memory than an fp32 master. What trains is an adapter, and the steps.

    Cast("bfloat16")      the weight in a narrower float, or as it was loaded. Steps are taken from what is stored. L4Q's frozen base
    Places("fixed")       the weight's places on its grid, u0 = w / s0, at the steps s0 with which training starts (LR-QAT, arXiv 2406.06385)

`Places` stores, for integers of b bits:

    fixed       8-bit fixed point: b bits before the point (sign and all), 8 - b behind it; 1 byte a weight, 2 <= b <= 7. Places beyond the grid's
                ends are cut to them
    integer     the same with nothing behind the point: round(u0). An adapter is then rounded by itself
    float32, bfloat16, float16      u0, cast

The steps that train begin as s0 and leave the places alone: u = u0 + shift (+ z), y = s (snap(u) - z), and so ds = sum g (v - z), with no term of u.
Dividing by the live step would be another method (L4Q's). With a zero, u0 of fixed point is counted from the middle of the grid at the zero z0 of the
start; a zero that training moves shifts the window of the grid, and no value inside it.

The stored tensor stands in the place of the master, as a buffer named `weight`: it is saved with the model, no optimizer sees it, and the original is
free as soon as nobody else holds it. Merging an adapter leaves places that are whole numbers, exact in each of these forms; a cast weight becomes an
fp32 master again, since w + d is not a number of the narrow type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.error import QuantError
from ..core.estimator import settle
from ..core.grid import Uniform
from ..core.noun import Noun
from ..core.qtensor import QTensor
from ..core.quantizer import Known, Quant, Quantizer, working

if TYPE_CHECKING:
    from .quantized import Quantized

FLOATS = ("float32", "bfloat16", "float16")
FORMS = ("fixed", "integer", *FLOATS)


@dataclass(frozen=True)
class Frozen(Noun):
    """The interface."""

    def build(self, quant: Any) -> Any:
        """The quantizer of a weight that is kept so."""
        raise NotImplementedError

    def freeze(self, layer: Quantized) -> None:
        """Put what is stored in the place of the layer's master, and start the quantizer."""
        raise NotImplementedError

    def dtype(self, master: torch.dtype) -> torch.dtype:
        """The type of what is stored, for a master of this type."""
        raise NotImplementedError

    def read(self, stored: Tensor) -> Tensor:
        """What the adapter and the quantizer see, fp32 or wider."""
        return working(stored)

    def latent(self, layer: Quantized) -> Tensor:
        """The frozen weight before rounding, (out, ...) layout."""
        return layer.matrix()

    def merge(self, layer: Quantized) -> None:
        """Merge the layer's adapter, which merges, into what is stored."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cast(Frozen):
    """The weight in the float type `to`, or in the type that it has."""

    to: str | None = None

    def __post_init__(self) -> None:
        if self.to is not None and self.to not in FLOATS:
            raise QuantError(f"Cast({self.to!r}): a frozen weight is cast to one of {', '.join(FLOATS)}, or kept in its type by None")

    def build(self, quant: Any) -> Any:
        return quant.build()

    def dtype(self, master: torch.dtype) -> torch.dtype:
        return master if self.to is None else getattr(torch, self.to)

    def freeze(self, layer: Quantized) -> None:
        w = layer.matrix().detach()
        layer.hold(w.to(self.dtype(w.dtype)))
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.initialise(layer.source().detach())

    def merge(self, layer: Quantized) -> None:
        layer.thaw(layer.adapter.merged(layer.matrix(), layer))   # type: ignore[union-attr]


@dataclass(frozen=True)
class Places(Frozen):
    """The places of the weight on its grid, as one of FORMS; the weight's Quant has a learned scale on whole numbers."""

    form: str = "fixed"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise QuantError(f"Places({self.form!r}): places are stored as one of {', '.join(FORMS)}")

    def build(self, quant: Any) -> PlacesQuantizer:
        return PlacesQuantizer(quant, self)

    def dtype(self, master: torch.dtype) -> torch.dtype:
        if self.form not in FLOATS:
            return torch.int8
        return master if master == torch.float64 else getattr(torch, self.form)

    def freeze(self, layer: Quantized) -> None:
        quantizer = layer.weight_quantizer
        if layer.transform is not None or not isinstance(quantizer, PlacesQuantizer):
            raise QuantError(f"{self} keeps places on the grid of one quantized matrix, not of {'rotated' if layer.transform is not None else 'no'} "
                             "one; keep it as Cast()")
        quantizer.initialise(layer.matrix().detach())
        layer.hold(quantizer.taken(layer.matrix().detach()))

    def latent(self, layer: Quantized) -> Tensor:
        quantizer: Any = layer.weight_quantizer
        return quantizer.unrounded(quantizer.moved(layer.matrix(), None))

    def merge(self, layer: Quantized) -> None:
        quantizer: Any = layer.weight_quantizer
        q = quantizer.quantize(layer.matrix(), layer.adapter.shift(layer.matrix()))  # type: ignore[union-attr]
        v = q.grain.view(q.values())
        layer.hold(q.grain.back(quantizer.stored(v if q.zero is None else v - q.zero.unsqueeze(-1), q.zero), q.shape).to(layer.weight.dtype))

    def fraction(self, bits: int) -> float:
        """What one unit of the place is multiplied with."""
        return 2.0 ** (8 - bits) if self.form == "fixed" else 1.0


class PlacesQuantizer(Quantizer):
    """A Quantizer that is shown places in place of values. `origin` (the scale's shape): what stored places are counted from, where there is a zero
    and fixed point."""

    origin: Tensor | None

    def __init__(self, quant: Quant, frozen: Places) -> None:
        grid = quant.grid
        if not (type(grid) is Uniform and grid.signed is not None) or quant.scale.keeps != "parameter" or quant.refit or quant.clip is not None:
            raise QuantError(f"{frozen} keeps places on whole numbers at a learned step; {grid} with {type(quant.scale).__name__}"
                             f"{', refit' if quant.refit else ''}{', clip' if quant.clip else ''} cannot be kept so. Write Learned(...), or Cast()")
        if frozen.form not in FLOATS and not 2 <= grid.bits <= 7 + (frozen.form == "integer"):
            raise QuantError(f"{frozen} holds places of 2 to 7 bits (integers: 8), not of {grid.bits}")
        super().__init__(quant)
        self.frozen, self.origin = frozen, None

    @torch.no_grad()
    def taken(self, w: Tensor) -> Tensor:
        """The weight (out, ...) -> what is stored of it, at the steps of now."""
        view = self.quant.grain.view(working(w))
        place = settle(self.place(view), self.quant)
        zero = None if place.zero is None else place.zero.squeeze(-1)
        return self.quant.grain.back(self.stored(view / place.s, zero), w.shape).to(self.frozen.dtype(w.dtype))

    @torch.no_grad()
    def stored(self, u: Tensor, zero: Tensor | None) -> Tensor:
        """Places (..., n), counted from the zero (...) -> what is stored of them, not yet cast; `origin` is set anew."""
        grid: Any = self.quant.grid
        if self.frozen.form in FLOATS:
            return u
        if zero is not None:
            self._origin(zero - (grid.low + 2 ** (grid.bits - 1)))
            u = u + self.origin.unsqueeze(-1)                     # type: ignore[union-attr]
        half = 2.0 ** (grid.bits - 1)
        return (u.clamp(-half, half - 1) * self.frozen.fraction(grid.bits)).round()

    def moved(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """What the layer stored, read, and a shift in steps -> the places, counted from the zero."""
        x = x / self.frozen.fraction(self.quant.grid.bits)
        if self.origin is not None:
            grain = self.quant.grain
            x = grain.back(grain.view(x) - self.origin.unsqueeze(-1).to(x.dtype), x.shape)
        return x if shift is None else x + shift

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        moved = self.moved(x, shift)
        rest = 1.0 if not self.on else 1 - self.blend if self.training else 0.0
        y = super().forward(_nought(moved), moved, known) if self.on else torch.zeros_like(moved)
        return y + rest * self.unrounded(moved) if rest else y

    def unrounded(self, moved: Tensor) -> Tensor:
        """What places, counted from the zero, stand for."""
        view = self.quant.grain.view(moved)
        return self.quant.grain.back(view * self.quant.scale.cast(self.place(view).s), moved.shape)

    def known(self, x: Tensor, shift: Tensor | None = None, into: Tensor | None = None) -> Known:
        moved = self.moved(x, shift)
        return super().known(_nought(moved), moved, into)

    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        moved = self.moved(x, shift)
        return super().quantize(_nought(moved), moved)

    def _origin(self, origin: Tensor) -> None:
        delattr(self, "origin") if "origin" in self.__dict__ else None
        self.register_buffer("origin", origin.clone())

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.origin is None and f"{prefix}origin" in state:
            self._origin(torch.zeros_like(state[f"{prefix}origin"]))
        super()._load_from_state_dict(state, prefix, *rest)


def _nought(x: Tensor) -> Tensor:
    """Zeros without memory."""
    return x.new_zeros(()).expand_as(x)
