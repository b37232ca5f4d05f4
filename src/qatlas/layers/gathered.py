"""Gradients of a kept weight that wait for those of the other micro-batches: they go back through the quantizer once for a step, not for each.

    d/dw sum_i L_i  =  pull(sum_i dL_i / dy)

holds because the closed forms are linear in the gradient that arrives, and because nothing is written between the micro-batches of a step: they all
see one kept value. Its forward costs nothing after the first either (quantized.py), so that under accumulation n the cost of the weight's
quantization falls to an n-th. The gradient of a weight under a gate is that of the plain way bit for bit, sums over a scale's elements are so up to
their order.

Nothing is detached: the last backward goes the whole way and fills `.grad` as ever, and hooks see it. `fit` opens and closes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import Quantized


class Waiting:
    """What waits. open: what comes now waits too; else it takes what waits along."""

    def __init__(self) -> None:
        self.open, self._own = False, False
        self.sum: Tensor | None = None

    def meet(self, g: Tensor) -> Tensor | None:
        """The gradient that goes on now, or None."""
        if self.sum is None:
            self.sum, self._own = g, False                        # somebody else may hold it: not ours to write
        else:
            self.sum, self._own = self.sum.add_(g) if self._own else self.sum + g, True
        return None if self.open else self.take()

    def take(self) -> Tensor | None:
        """All that waits; then nothing does."""
        found, self.sum = self.sum, None
        return found


class Meet(torch.autograd.Function):
    """A kept value -> itself; its gradient waits or goes on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, waiting: Waiting) -> Tensor:  # type: ignore[override]
        ctx.waiting = waiting
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return (g if torch.is_grad_enabled() else ctx.waiting.meet(g)), None


@contextlib.contextmanager
def gathering(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While it lasts, gradients of kept weights may wait: `waits(model)` says when."""
    layers = [m for m in model.modules() if wanted and isinstance(m, Quantized) and m.keep == "buffer"]
    for layer in layers:
        waiting = Waiting()
        layer.meet = lambda y, waiting=waiting: Meet.apply(y, waiting)
        layer.waiting = waiting
    try:
        yield
    finally:
        for layer in layers:
            layer.meet = layer.waiting = None


@contextlib.contextmanager
def waits(model: nn.Module, wanted: bool) -> Iterator[None]:
    """One micro-batch: wanted, its gradients wait for the next; not, they take along all that waits, also in layers that it does not reach."""
    found = [m for m in model.modules() if isinstance(m, Quantized) and m.waiting is not None]
    for layer in found:
        layer.waiting.open = wanted
    try:
        yield
    except BaseException:
        for layer in found:
            layer.waiting.take()
        raise
    for layer in found:
        if not wanted and (rest := layer.waiting.take()) is not None:
            layer.quantized().backward(rest)
