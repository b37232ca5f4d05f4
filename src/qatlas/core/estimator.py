"""Estimator: what the gradient is told about the step. And Snap, the only autograd function of the quantizer.

Rounding is flat almost everywhere, so its true gradient is useless and each method tells another story: pass it (Ste), pass it inside the range only
(Clip), pass it where the rounding error is small (Trust), or bend it (a paper's own, in the paper's file). An estimator is `(g, u, v, grid) -> dx`:
g the gradient that arrives, u the place, v the value it snapped to.

The estimator speaks for x only. The scale never hears it: it has its own declared rule (`Scale.slope`), and the zero and the offset hear their closed
forms. Two paths, never one. With y = s (v - z), u = x / s + z:

    dx = estimator(g, u, v)
    ds = factor * sum g * slope         v - u inside, v - z outside
    dz = sum g * (0 inside, -s outside)
    dm = sum g * (0 inside,  1 outside)    for y = s v + m, u = (x - m) / s

Nothing here leans on autograd of round or clamp. Snap saves what its backward reads and no more: x and the scales, never u or v (the place is
recomputed), and nothing at all where the estimator is blind and no scale hears, as for activations with a fresh scale a token.

The lines of the formula may be run by another `Formula`: the functions of this file are the reference, and what stands in for them gives the same
values bit for bit (kernels/compiled.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from . import again
from .gate import between, gate
from .grid import Grid
from .noun import Noun
from .place import Place, decode, locate
from .portion import divides, in_portions

if TYPE_CHECKING:
    from .quantizer import Quant


@dataclass(frozen=True)
class Estimator(Noun):
    """The interface: `(g, u, v, grid) -> dx`, all of one shape. `blind`: it looks at g only, so that u and v need not be computed."""

    blind: ClassVar[bool] = False

    def __call__(self, g: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Ste(Estimator):
    """dx = g. The straight-through estimator (arXiv 1308.3432): BitNet, TWN, StatsQ."""

    blind: ClassVar[bool] = True

    def __call__(self, g: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return g


@dataclass(frozen=True)
class Clip(Estimator):
    """dx = g inside the grid's reach widened by `margin` steps, else 0. margin 0 cuts at the last level (LSQ), 0.5 where rounding does.
    `at` replaces the grid's reach by +-at (binary weights: 1 is the sign's reach, ReSTE's t is wider)."""

    margin: float = 0.0
    at: float | None = None

    def __call__(self, g: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return grid.passes(g, u, self.margin) if self.at is None else gate(g, u, -self.at, self.at)


@dataclass(frozen=True)
class Trust(Estimator):
    """dx = g where |u - v| <= bound, else 0. QuEST's (arXiv 2502.05003): where rounding is off by more, the gradient is not trusted."""

    bound: float = 0.5

    def __call__(self, g: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return gate(g, u - v, -self.bound, self.bound)


class Formula(Protocol):
    """Another way to run the formula of one Quant: the same values, bit for bit, and the same gradients but for the order of sums."""

    quant: Quant

    def values(self, x: Tensor, place: Place, shift: Tensor | None, into: Tensor | None = None) -> Tensor:
        """y of `forward`; written into memory of x's shape where that is given."""

    def pull(self, g: Tensor, x: Tensor, place: Place, shift: Tensor | None, strength: float) -> tuple[Tensor | None, ...]:
        """As `pull`."""


class Snap(torch.autograd.Function):
    """x (..., n), s, zero, offset (..., 1), shift (..., n) in steps or None -> y (..., n), by `quant`'s formula and gradients.

    known (..., n): y where it has been computed already, of the same x; forward then returns it, and backward is the same.
    formula: who runs the lines; None is this file.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, zero: Tensor | None, offset: Tensor | None, shift: Tensor | None,  # type: ignore[override]
                known: Tensor | None, quant: Quant, strength: float, formula: Formula | None) -> Tensor:
        ctx.quant, ctx.strength, ctx.formula = quant, strength, formula
        ctx.set_materialize_grads(False)
        ctx.blind = quant.estimator.blind and shift is None and not any(ctx.needs_input_grad[1:4])
        ctx.save_for_backward(*((x, s, zero, offset, shift) if not ctx.blind else () if quant.clip is None else (x,)))
        if known is not None:
            return known.detach()
        place = Place(s, zero, offset)
        return values(x, place, shift, quant) if formula is None else formula.values(x, place, shift)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if g is None:                                             # it waits for others (layers/gathered.py)
            return (None,) * 9
        if ctx.blind:
            return (g if ctx.quant.clip is None else inside(g, ctx.saved_tensors[0], ctx.quant), *(None,) * 8)
        x, s, zero, offset, shift = ctx.saved_tensors
        place = Place(s, zero, offset)
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():                               # a second derivative wants the lines themselves
            grads = pull(g, x, place, shift, ctx.quant, ctx.strength)
        elif ctx.formula is None:
            grads = pulled(g, x, place, shift, ctx.quant, ctx.strength)
        else:
            grads = ctx.formula.pull(g, x, place, shift, ctx.strength)
        return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None, None


def forward(x: Tensor, place: Place, shift: Tensor | None, quant: Quant) -> tuple[Tensor, Tensor, Place]:
    """The one formula: -> y, v, and the place with which v is decoded (cast to the stored type; refitted if the quant says so)."""
    settled, x = settle(place, quant), bounded(x, quant.clip)
    u = locate(x, settled)
    v = quant.grid.snap(u if shift is None else u + shift)
    if quant.refit:
        settled = settled._replace(s=quant.scale.cast(refit(x, v, settled)))
    return decode(v, settled), v, settled


def values(x: Tensor, place: Place, shift: Tensor | None, quant: Quant, into: Tensor | None = None) -> Tensor:
    """y of `forward`, of a large x without its large temporaries; written into memory of x's shape where that is given."""
    if not (_apart(quant) and divides(x, *place, shift)):
        y = forward(x, place, shift, quant)[0]
        return y if into is None else into.copy_(y)
    into = torch.empty_like(x, memory_format=torch.contiguous_format) if into is None else into
    in_portions(lambda x, s, zero, offset, shift: forward(x, Place(s, zero, offset), shift, quant)[:1], x, *place, shift, into=into)
    return into


def _apart(quant: Quant) -> bool:
    """Whether rows know nothing of each other: two-level steps are rounded together."""
    return quant.scale.nested is None and quant.scale.offset_nested is None


def bounded(x: Tensor, clip: float | None) -> Tensor:
    """x cut to +-clip; its gradient passes strictly inside only."""
    if clip is None:
        return x
    cut = x.detach().clamp(-clip, clip)
    return torch.where(x.abs() < clip, x, cut) if x.requires_grad else cut


def settle(place: Place, quant: Quant) -> Place:
    """The place as it will be stored: the step cast, an integer zero rounded and kept on the grid, an offset cast."""
    zero = place.zero
    if zero is not None:
        zero = zero.round().clamp(quant.grid.low, quant.grid.high)
    offset = None if place.offset is None else quant.scale.cast_offset(place.offset)
    return Place(quant.scale.cast(place.s) if not quant.refit else place.s.clamp(min=quant.scale.smallest), zero, offset)


def refit(x: Tensor, v: Tensor, place: Place) -> Tensor:
    """The least-squares step of x on v, <x, v> / <v, v>, not yet cast: TWN's mean of the survivors, mean|w| of binary nets. The old step where v is
    all zero."""
    if place.offset is not None:
        x = x - place.offset
    v = v if place.zero is None else v - place.zero
    length = v.square().sum(-1, keepdim=True)
    return torch.where(length > 0, (x * v).sum(-1, keepdim=True) / length.clamp(min=torch.finfo(v.dtype).tiny), place.s)


def passing(quant: Quant) -> bool:
    """Whether x is told the gradient as it arrives."""
    return quant.estimator.blind and quant.clip is None


def inside(dx: Tensor, x: Tensor, quant: Quant) -> Tensor:
    """The gradient of x, 0 at the clip and beyond."""
    return dx if quant.clip is None else between(dx, x, -quant.clip, quant.clip)


def pull(g: Tensor, x: Tensor, place: Place, shift: Tensor | None, quant: Quant, strength: float) -> tuple[Tensor | None, ...]:
    """The gradients of (x, s, zero, offset, shift) by closed form."""
    grid, raw, place = quant.grid, place.s, settle(place, quant)
    u = locate(bounded(x, quant.clip), place)
    u = u if shift is None else u + shift
    v = grid.snap(u)
    dx = quant.estimator(g, u, v, grid)
    dshift = None if shift is None else dx * place.s
    dx = inside(dx, x, quant)
    ds = (g * quant.scale.slope(u, v, place.zero, grid)).sum(-1, keepdim=True) * strength
    if quant.scale.sign == "abs":
        ds = torch.where(raw < 0, -ds, ds)                        # d|s|/ds
    outside = g if place.zero is None and place.offset is None else g - grid.passes(g, u, quant.scale.margin)
    dzero = None if place.zero is None else -(outside * place.s).sum(-1, keepdim=True) * strength
    doffset = None if place.offset is None else outside.sum(-1, keepdim=True) * strength
    return dx, ds, dzero, doffset, dshift


def pulled(g: Tensor, x: Tensor, place: Place, shift: Tensor | None, quant: Quant, strength: float) -> Sequence[Tensor | None]:
    """`pull`, of a large x without its large temporaries."""
    if not (_apart(quant) and divides(x, g, *place, shift)):
        return pull(g, x, place, shift, quant, strength)
    def part(g: Tensor, x: Tensor, s: Tensor, zero: Tensor | None, offset: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, *rest = pull(g, x, Place(s, zero, offset), shift, quant, strength)
        return None if passing(quant) else dx, *rest

    dx, *rest = in_portions(part, g, x, *place, shift, into=None if passing(quant) else again.empty(x))
    return g if passing(quant) else dx, *rest
