"""A model whose whole step is compiled: forward and backward as torch.compile makes them, the quantizers' lines fused into what stands around.

    with traced(model):
        model(x).sum().backward()

A weight under keep="buffer" enters the compiled graph as a tensor that is there already, so that it is quantized once for each write and not in
each forward. A graph cannot ask whether a weight was written since; who calls it can: each call looks at the version counters first, as `Quantized`
does, and quantizes afresh, outside of the graph, what was written. Without this file's context a compiled layer of keep="buffer" quantizes in every
forward, as "each" does; "recompute" is the compiler's own business then (it computes again what is cheap). Other states that live in Python stay
eager: gradients of micro-batches do not wait for each other in a graph.

Values: a compiler of whole graphs may order sums otherwise, as in any model that it compiles; codes are made by the eager lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .quantized import Quantized


@contextlib.contextmanager
def traced(model: nn.Module, **how: Any) -> Iterator[nn.Module]:
    """While it lasts, calls of `model` run compiled. how: what torch.compile takes."""
    layers = [m for m in model.modules() if isinstance(m, Quantized)]
    run = torch.compile(model._call_impl, **how)

    def call(*given: Any, **named: Any) -> Any:
        for layer in layers:
            layer.fill()
        return run(*given, **named)

    for layer in layers:
        layer.ahead = True
    model._compiled_call_impl = call  # type: ignore[assignment]
    try:
        yield model
    finally:
        model._compiled_call_impl = None
        for layer in layers:
            layer.ahead = False
