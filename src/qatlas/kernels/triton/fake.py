"""Fake quantization in one pass over memory each way: forward reads x and writes y, backward reads g and x and writes dx and the sums.

What is saved is x and the steps, as by the eager lines; the place u is computed again. The eager lines of core/estimator.py are the reference: values
and dx are theirs bit for bit (division rounded to nearest, no fused product and sum), sums up to their order. Steps are settled (cast to the stored
type, signs, floors) by the eager lines too, which is nothing beside the weight.

`Fused` is a Formula as kernels/compiled.py's, and `fused(model)` is used as `compiled(model)` is. What a compiler makes of these kernels is not
believed: `check` holds each Quant against the eager lines on the device, on ties, ends, zeros and far outliers, and refuses at the first difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import QuantError
from ...core.estimator import forward, pull, settle
from ...core.place import Place
from ...core.quantizer import Quant, Quantizer
from ...core.scale import Scale
from .lang import jit, launch, power, tl, why_not_here
from .snap import KINDS, gate, passes, snap, why_not_snap, within

TILE = 4096                                                       # elements of a program


@jit
def located(ptr, at, mask, s, m, z, clip, CLIP: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """x as it is, and its place u."""
    x = tl.load(ptr + at, mask=mask, other=0.0)
    u = x
    if CLIP:
        u = tl.where(u < -clip, -clip, tl.where(u > clip, clip, u))
    if OFFSET:
        u = u - m
    u = tl.math.div_rn(u, s)
    if ZERO:
        u = u + z
    return x, u


@jit
def fake_forward(x, step, zero, offset, y, rows, n, low, high, threshold, clip, KIND: tl.constexpr, CLIP: tl.constexpr, ZERO: tl.constexpr,
                 OFFSET: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """y = s (snap(x / s + z) - z), or s snap((x - m) / s) + m. x (rows, n) contiguous; step, zero, offset (rows,)."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    safe = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    mask = (row < rows)[:, None] & (column < n)
    s, m, z = tl.load(step + safe), 0.0, 0.0
    if ZERO:
        z = tl.load(zero + safe)
    if OFFSET:
        m = tl.load(offset + safe)
    _, u = located(x, safe * n + column, mask, s, m, z, clip, CLIP, ZERO, OFFSET)
    v = snap(u, low, high, threshold, KIND)
    if ZERO:
        v = v - z
    v = s * v
    if OFFSET:
        v = v + m
    tl.store(y + safe * n + column, v, mask=mask)


@jit
def fake_backward(g, x, step, zero, offset, dx, ds, dz, rows, n, low, high, threshold, clip, first, last, inner, outer, KIND: tl.constexpr,
                  GATE: tl.constexpr, INSIDE: tl.constexpr, VALUE: tl.constexpr, CLIP: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
                  SUMS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """dx, and the sums of a tile for the step (ds) and for zero or offset (dz), each (rows, tiles of a row). first, last: ends of the estimator's
    gate; inner, outer: of the step's."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    safe = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    mask = (row < rows)[:, None] & (column < n)
    s, m, z = tl.load(step + safe), 0.0, 0.0
    if ZERO:
        z = tl.load(zero + safe)
    if OFFSET:
        m = tl.load(offset + safe)
    given, u = located(x, safe * n + column, mask, s, m, z, clip, CLIP, ZERO, OFFSET)
    v = snap(u, low, high, threshold, KIND)
    grad = tl.load(g + safe * n + column, mask=mask, other=0.0)
    d = tl.where(passes(u, v, first, last, GATE), grad, 0.0)
    if CLIP:
        d = tl.where((given <= -clip) | (given >= clip), 0.0, d)
    tl.store(dx + safe * n + column, d, mask=mask)
    if SUMS:
        inside = passes(u, v, inner, outer, INSIDE)
        end = v
        if ZERO:
            end = v - z
        if VALUE:
            slope = end
        else:
            slope = tl.where(inside, v - u, end)
        at = tl.program_id(1) + row.to(tl.int64) * tl.num_programs(1)
        tl.store(ds + at, tl.sum(tl.where(mask, grad * slope, 0.0), 1), mask=row < rows)
        if ZERO or OFFSET:
            out = tl.where(mask & ~inside, grad, 0.0)
            if ZERO:
                out = -(out * s)
            tl.store(dz + at, tl.sum(out, 1), mask=row < rows)


def why_not(quant: Quant) -> str:
    """Why the fused kernels cannot run this Quant; nothing where they can."""
    if reason := why_not_snap(quant.grid, quant.estimator):
        return reason
    if quant.refit:
        return "a refit moves the values by a sum"
    if quant.scale.nested is not None or quant.scale.offset_nested is not None:
        return "scales that are quantized themselves"
    return "" if type(quant.scale).slope is Scale.slope else f"{type(quant.scale).__name__} has a gradient of its own"


class Fused:
    """The formula of one Quant in kernels: what core.estimator.Formula asks for. What they cannot take (fp64, a shift) runs eager."""

    def __init__(self, quant: Quant) -> None:
        if reason := why_not(quant):
            raise QuantError(f"no fused fake quantization for {quant.label}: {reason}")
        self.quant, grid = quant, quant.grid
        self._grid = (grid.low, grid.high, getattr(grid, "threshold", 0.0), 0.0 if quant.clip is None else quant.clip)
        self._kind, self._gate, self._inside = KINDS[type(grid)], gate(grid, quant.estimator), within(grid, quant.scale.margin)

    def values(self, x: Tensor, place: Place, shift: Tensor | None, into: Tensor | None = None) -> Tensor:
        """y of (..., n); copied into memory of x's shape where that is given."""
        return self._values(x, place, shift) if into is None else into.copy_(self._values(x, place, shift))

    def _values(self, x: Tensor, place: Place, shift: Tensor | None) -> Tensor:
        if not self._takes(x, place, shift):
            return forward(x, place, shift, self.quant)[0]
        flat, arguments, constants, grid = self._laid(x, place)
        y = torch.empty_like(flat)
        launch(fake_forward, grid, flat, *arguments, y, *flat.shape, *self._grid, fuse=False, **constants)
        return y.view(x.shape)

    def pull(self, g: Tensor, x: Tensor, place: Place, shift: Tensor | None, strength: float) -> tuple[Tensor | None, ...]:
        """The gradients of (x, s, zero, offset, shift)."""
        if not self._takes(x, place, shift) or g.dtype != torch.float32:
            return pull(g, x, place, shift, self.quant, strength)
        flat, arguments, constants, grid = self._laid(x, place)
        dx = torch.empty_like(flat)
        sums = flat.new_empty(2, len(flat), grid[1])
        launch(fake_backward, grid, g.reshape(flat.shape).contiguous(), flat, *arguments, dx, sums[0], sums[1], *flat.shape, *self._grid,
               *self._gate[1:], *self._inside[1:], fuse=False, GATE=self._gate[0], INSIDE=self._inside[0], SUMS=True,
               VALUE=self.quant.scale.gradient == "value", **constants)
        ds, dother = ((t.sum(-1) * strength).view(place.s.shape) for t in sums)
        if self.quant.scale.sign == "abs":
            ds = torch.where(place.s < 0, -ds, ds)
        return dx.view(x.shape), ds, None if place.zero is None else dother, None if place.offset is None else dother, None

    def _takes(self, x: Tensor, place: Place, shift: Tensor | None) -> bool:
        right = x.dtype == place.s.dtype == torch.float32 and x.dim() > 0 and x.numel() > 0 and place.s.numel() * x.shape[-1] == x.numel()
        return shift is None and right and not why_not_here(x.device)

    def _laid(self, x: Tensor, place: Place) -> tuple[Tensor, list[Any], dict[str, Any], tuple[int, int]]:
        n = x.shape[-1]
        flat = x.detach().reshape(-1, n).contiguous()
        settled = [None if t is None else t.detach().expand(place.s.shape).reshape(-1).contiguous() for t in settle(place, self.quant)]
        bc = min(power(n), TILE)
        br = min(max(TILE // bc, 1), power(len(flat)))
        constants = {"KIND": self._kind, "CLIP": self.quant.clip is not None, "ZERO": place.zero is not None, "OFFSET": place.offset is not None,
                     "BR": br, "BC": bc}
        return flat, settled, constants, (-(-len(flat) // br), -(-n // bc))


@contextmanager
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts, the quantizers of `model` that can run in kernels. Codes are the same in and out.

    Raises:
        QuantError: kernels that give other values than the eager lines on this device.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = [q for q in model.modules() if isinstance(q, Quantizer) and q.formula is None and q.ready and not why_not(q.computes)]
    formulas: dict[Quant, Fused] = {}
    try:
        for quantizer in found if not why_not_here(device) else []:
            if quantizer.computes not in formulas:
                formulas[quantizer.computes] = check(Fused(quantizer.computes), device)
            quantizer.formula = formulas[quantizer.computes]
        yield model
    finally:
        for quantizer in found:
            quantizer.formula = None


@torch.no_grad()
def check(formula: Fused, device: torch.device) -> Fused:
    """The formula, held against the eager lines on a device.

    Raises:
        QuantError: other values, or gradients that are further away than the order of a sum explains.
    """
    quant, x = formula.quant, torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(64.0) - 32
    x[1], x[2], x[3], x[4] = steps / 64, steps / 32 * max(abs(quant.grid.low), quant.grid.high), 0.0, x[4] * 1e-3
    x[5, :2] *= 1e4
    x, g = x.to(device), torch.linspace(-1, 1, 64 * 6, device=device).reshape(6, 64)
    place = quant.measure(x)
    values, wanted = formula.values(x, place, None), forward(x, place, None, quant)[0]
    if not torch.equal(values, wanted):
        raise QuantError(f"the fused fake quantization of {quant} gives other values than the eager one in {int((values != wanted).sum())} of "
                         f"{wanted.numel()} places on {device.type}; codes would not be those that are exported. Leave it out")
    for i, (ours, eager) in enumerate(zip(formula.pull(g, x, place, None, 1.0), pull(g, x, place, None, quant, 1.0), strict=True)):
        if (ours is None) != (eager is None):
            raise QuantError(f"the fused gradients of {quant} are not those of the eager lines")
        if ours is None or eager is None:
            continue
        same = torch.equal(ours, eager) if i == 0 else torch.allclose(ours, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))
        if not same:
            raise QuantError(f"the fused gradients of {quant} differ from the eager ones by {float((ours - eager).abs().max()):.3g} on "
                             f"{device.type}. Leave it out")
    return formula
