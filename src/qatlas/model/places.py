"""Places: where the weights of a model lie on their grids, weight by weight. What regularisers and measures of oscillation are written with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.estimator import settle
from ..core.place import locate
from ..core.quantizer import Quantizer, working
from ..layers.rows import RowsQuantizer
from .quantized import quantized


def weights(model: nn.Module) -> Iterator[tuple[Quantizer, Tensor]]:
    """Each weight quantizer and the weight that it sees, (out, ...) layout, with its graph; tied weights once."""
    done: set[int] = set()
    for layer in quantized(model).values():
        inner: Any = layer.weight_quantizer
        if inner is None or id(inner) in done:
            continue
        done.add(id(inner))
        parts: Any = inner.parts if isinstance(inner, RowsQuantizer) else [inner]
        yield from ((part, w) for part, w in zip(parts, layer.source().chunk(len(parts)), strict=True) if isinstance(part, Quantizer))


@contextlib.contextmanager
def lit(quantizer: Quantizer) -> Iterator[None]:
    """The quantizer on inside, afterwards as it was."""
    before, quantizer.on = quantizer.on, True
    try:
        yield
    finally:
        quantizer.on = before


@torch.no_grad()
def places(quantizer: Quantizer, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a weight's view, (groups, n) each and without a graph: u, its place in steps; v, the nearest of the grid; whether u is inside the grid; the
    values that it is rounded to, also where the quantizer is off."""
    quant = quantizer.quant
    view = quant.grain.view(working(w))
    u = locate(view, settle(quantizer.place(view), quant))
    with lit(quantizer):
        values = quant.grain.view(quantizer.hard(w))
    return u, quant.grid.snap(u), quant.grid.inside(u), values


def at_edges(model: nn.Module, within: float = 0.1) -> float:
    """The share of the quantized weights that lie within so many steps of an edge between two bins."""
    near, total = 0, 0
    for quantizer, w in weights(model):
        u, v, inside, _ = places(quantizer, w)
        near, total = near + int(((u - v).abs() >= 0.5 - within)[inside].sum()), total + w.numel()
    return near / max(total, 1)
