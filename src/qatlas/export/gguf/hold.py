"""Hold: a trained QTensor rewritten in a block's own form (layout.py) without moving a value, or the reason why no rewriting does.

Four things may differ between how a tensor was trained and how a block says it. Each is bridged where that is exact, and only there:

1. The grid. Its values v need not be the block's integers: with a power of two k and a shift H for which all q = k (v + H) are,
   s v = (s / k) q - s H. So the grids -1.5 -0.5 0.5 1.5 and E2M1 go into Q4_0 and Q8_0 (H = 0, k = 2). Where a block has an offset, -s H goes there:
   signed integers into Q4_1, half-integers into Q2_K (d = s, dmin = s / 2, mn = 3; with two-level steps dmin = 1.5 d, mn = sc).
2. The zero. An integer z is folded into the integer, q = k (v - z + H), where the block has the room (4 bits with a zero into Q5_0), or becomes the
   offset s z, where that fits (Q4_K with one step a block: mn = z).
3. The grain. A coarser one only repeats its step, which costs nothing that the format does not take anyway. A finer one, or one that straddles, does
   not fit.
4. The step. d must be a number of its type: a step that would be rounded here was not the one that was trained with. A two-level step
   (`Scale.nested`) gives d and sc as they are; one step for a whole block is d with sc = 1.

An offset m in values is the block's offset if its type holds it (`Scale.offset_dtype`, `offset_nested`) and H = 0.

Why this is equal bit for bit, and not only nearly: all products on both sides are exact in fp32, so each side rounds the same real number once. The
result is compared with the tensor before it is given back all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.grain import Grain
from ...core.grid import Grid
from ...core.qtensor import QTensor
from .layout import Layout

TIMES = tuple(2**i for i in range(8))
UNITS = tuple(2.0**i for i in range(7, -5, -1))                    # what mn may count, as multiples of d


def images(values: Tensor, layout: Layout) -> Iterator[tuple[int, float]]:
    """All (k, H) for which k (v + H) are codes of the layout, for all values v; the plainest first.

    >>> from .layout import LAYOUTS
    >>> next(images(torch.tensor([-1.5, -0.5, 0.5, 1.5]), LAYOUTS["q2_k"]))
    (1, 1.5)
    """
    known = layout.grid.values()
    low, high = float(known[0]), float(known[-1])
    for k in TIMES:
        v = values * k
        first, last = low - float(v.min()), high - float(v.max())
        shifts = [first + i for i in range(int(last - first) + 1)] if layout.shifted else [0.0]
        for h in sorted(shifts, key=lambda h: (h != 0, odd(h), h)):
            if bool(torch.isin(v + h, known).all()):
                yield k, h / k


def odd(number: float) -> int:
    """The odd part of a number that is an integer over a power of two: 3 of 1.5, 1 of a power of two; 0 of 0."""
    top = abs(float(number)).as_integer_ratio()[0]
    return top // (top & -top) if top else 0


def spread(grain: Grain, values: Tensor, shape: tuple[int, ...], size: int) -> Tensor | None:
    """One number for each `size` inputs: (the grain's) -> (out, in / size), or None where some would need two."""
    view = grain.view(torch.empty(shape, device="meta")).shape
    each = grain.back(values.unsqueeze(-1).expand(view), shape).unflatten(-1, (-1, size))      # (out, in / size, size)
    return each[..., 0] if bool((each == each[..., :1]).all()) else None


def hold(tensor: QTensor, layout: Layout) -> QTensor | str:
    """The tensor (out, in) in the layout's own form, or why there is none."""
    shape, n = tuple(tensor.shape), layout.size // layout.subs
    if tensor.offset is not None and not layout.shifted:
        return NO_OFFSET
    zero = None if tensor.zero is None else spread(tensor.grain, tensor.zero.double(), shape, n)
    if tensor.zero is not None and zero is None:
        return straddles(tensor.grain, n)
    reason: str = ""
    steps: Any = None
    for fold, k, shift in _ways(tensor, layout):
        steps = steps or (_levels if layout.steps is not None else _plain)(tensor, layout)
        if isinstance(steps, str):
            return steps
        left = None if fold else zero
        parts = _parts(tensor, layout, (steps[0] / k, steps[1]), k, shift, left)
        if isinstance(parts, str):
            reason = reason or parts
            continue
        v = tensor.values()
        v = v if zero is None or not fold else v - zero.to(v.dtype).repeat_interleave(n, -1)
        own = QTensor(layout.grid.encode((v + shift) * k), parts[0], None, parts[1], layout.grid, layout.grain,
                      layout.dtype if layout.steps is None else "float32")
        if torch.equal(own.dequantize().to(tensor.steps.dtype), tensor.dequantize()):
            return own
        reason = reason or f"the formula of {layout.type} gives other fp32 numbers"
    return reason or no_image(tensor.grid, layout, tensor.zero is not None, tensor.offset is not None)


def _ways(tensor: QTensor, layout: Layout) -> Iterator[tuple[bool, int, float]]:
    """(whether the zero goes into the codes, k, H), all that the grids allow."""
    if tensor.grid.bits > 8 or getattr(tensor.grid, "signed", True) is None:
        return
    values = tensor.grid.values()
    if tensor.offset is not None or tensor.zero is None or layout.shifted:
        yield from ((False, k, h) for k, h in images(values, layout) if h == 0 or (tensor.zero is None and tensor.offset is None))
    if tensor.zero is not None:
        values = (values[:, None] - tensor.zero.unique().cpu()).unique()
        yield from ((True, k, h) for k, h in images(values, layout))


def _plain(tensor: QTensor, layout: Layout) -> tuple[Tensor, Tensor] | str:
    """d (out, blocks), and ones: one step a block."""
    d = spread(tensor.grain, tensor.steps.double(), tuple(tensor.shape), layout.size)
    return straddles(tensor.grain, layout.size) if d is None else (d, torch.ones_like(d))


def _levels(tensor: QTensor, layout: Layout) -> tuple[Tensor, Tensor] | str:
    """d (out, blocks), sc (out, blocks, subs)."""
    found = levels(tensor.scale, tensor.grain, tuple(tensor.shape), layout)
    if found is not None:
        d, sc = found
        inside = layout.steps is not None and bool(torch.isin(sc, layout.steps.values().to(sc)).all())
        return (d, sc) if inside else f"the steps of the steps are not the integers of {layout.type}, {ends(layout.steps)}"
    n = layout.size // layout.subs
    if spread(tensor.grain, tensor.steps, tuple(tensor.shape), n) is None:
        return straddles(tensor.grain, n)
    return f"a block of {layout.size} has one fp16 step, and {layout.subs} integers to multiply it with: {TWO_LEVELS}"


def levels(scale: Tensor | QTensor, grain: Grain, shape: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor] | None:
    """A two-level scale or offset -> the outer number of each block (out, blocks) and the inner ones (out, blocks, subs); None where it has other
    boundaries. One level is taken as an outer number times one."""
    if not isinstance(scale, QTensor):
        outer = spread(grain, scale.double(), shape, layout.size)
        return None if outer is None else (outer, torch.ones(*outer.shape, layout.subs, dtype=outer.dtype, device=outer.device))
    if scale.zero is not None or scale.offset is not None:
        return None
    each = scale.grain.back(scale.steps.double().unsqueeze(-1).expand(scale.grain.view(scale.codes).shape), scale.shape)
    outer, inner = spread(grain, each, shape, layout.size), spread(grain, scale.values().double(), shape, layout.size // layout.subs)
    return None if outer is None or inner is None else (outer, inner.unflatten(-1, (-1, layout.subs)))


def _parts(tensor: QTensor, layout: Layout, steps: tuple[Tensor, Tensor], k: int, shift: float, zero: Tensor | None) -> tuple[Any, Any] | str:
    """Scale and offset of the own form, or the reason."""
    d, sc = steps                                                  # d is that of the integers, s / k
    if (reason := _not_of(d, layout.dtype, "steps")) is not None:
        return reason
    if layout.steps is None:
        offset = None
        if tensor.offset is not None:
            offset = spread(tensor.grain, tensor.offsets.double(), tuple(tensor.shape), layout.size)  # type: ignore[union-attr]
            if offset is None:
                return straddles(tensor.grain, layout.size)
        elif layout.shifted:
            offset = -d * k * (shift if zero is None else zero + shift)
        reason = None if offset is None else _not_of(offset, "float16", "offsets")
        return reason or (d.float(), None if offset is None else offset.float())
    scale = QTensor(layout.steps.encode(sc).flatten(-2), d.float(), None, None, layout.steps, layout.grain.but(size=layout.subs), layout.dtype)
    if not layout.shifted:
        return scale, None
    found = _minimum(tensor, layout, d * k, sc, shift, zero)
    if isinstance(found, str):
        return found
    dmin, mn = found
    return scale, QTensor(layout.steps.encode(mn).flatten(-2), -dmin.float(), None, None, layout.steps, scale.grain, "float16")


def _minimum(tensor: QTensor, layout: Layout, d: Tensor, sc: Tensor, shift: float, zero: Tensor | None) -> tuple[Tensor, Tensor] | str:
    """dmin (out, blocks) and mn (out, blocks, subs) with dmin mn = minus the offset."""
    assert layout.steps is not None
    known = layout.steps.values().to(d)
    if tensor.offset is not None:
        found = levels(tensor.offset, tensor.grain, tuple(tensor.shape), layout)
        if found is None or not bool(torch.isin(found[1], known).all()):
            return (f"the offsets are not the integers of {layout.type}, {ends(layout.steps)}, times one number a block; "
                    "write Scale(offset_nested=...)")
        return _not_of(found[0], "float16", "offsets") or (-found[0], found[1])
    amount = sc * shift if zero is None else sc * (zero.unflatten(-1, (-1, layout.subs)) + shift)
    for unit in (*((shift,) if shift and zero is None else ()), *UNITS):
        mn = amount / unit
        if bool(torch.isin(mn, known).all()) and _not_of(d * unit, "float16", "") is None:
            return d * unit, mn
    return f"no fp16 number times {ends(layout.steps)} gives the offsets that {layout.type} needs for {tensor.grid}"


def _not_of(values: Tensor, dtype: str, what: str) -> str | None:
    """Why these are no numbers of a type, or None. An E8M0 has no sign and no zero."""
    kind = getattr(torch, dtype)
    bad = values.float().to(kind).to(values.dtype) != values
    if not bool(bad.any()):
        return None
    name = {"float16": "fp16 numbers", "float8_e8m0fnu": "powers of two"}[dtype]
    return (f"{int(bad.sum())} of {bad.numel()} {what} are no {name} (the first: {float(values[bad][0])!r}); "
            "train with the target, or round them and take the codes anew before exporting")


OTHER = {"MXFP4": "numbers of E2M1", "IQ4_NL": "16 numbers of the table"}
NO_OFFSET = "a float offset has no place in a symmetric block; take a scale without one, such as AbsMax()"
TWO_LEVELS = "train with two levels, Scale(nested=...), as `fit` does, or with one step for the whole block"


def straddles(grain: Grain, size: int) -> str:
    """The reason for a grain that is too fine."""
    return (f"{grain} gives neighbours within a block of {size} different steps; "
            f"take a group that is a multiple of {size}, or one step a channel")


def ends(grid: Grid | None) -> str:
    """The integers of a grid, in words."""
    return "" if grid is None else f"{math.floor(grid.low)} .. {math.ceil(grid.high)}"


def no_image(grid: Grid, layout: Layout, zero: bool, offset: bool) -> str:
    """The reason for a grid that has no place on the layout's."""
    if grid.bits > 8:
        return f"{grid} takes {grid.bits} bits, and no block of ours takes more than 8"
    if getattr(grid, "signed", True) is None:
        return f"{grid} has not settled whether it is signed; weights are, write signed=True"
    theirs = f"the {OTHER.get(layout.type, f'integers {ends(layout.grid)}')} of {layout.type}"
    if zero:
        return f"with a zero point of its own each step holds more values of {grid} than {theirs}; take a scale without one, such as AbsMax()"
    if offset:
        return f"beside an offset the values of {grid} are to be {theirs} themselves; take Uniform({grid.bits}, signed=False)"
    return f"the values of {grid} are not {theirs}, nor those over a power of two"
