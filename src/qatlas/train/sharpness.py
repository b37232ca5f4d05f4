"""Sharpness: the top eigenvalue and the trace of the Hessian of a loss, at the point where the layers compute.

What low bits do to the surface of a loss is told by the curvature there. A quantized layer computes with `hard()`, not with its master, and the
rounding between the two has no second derivative: so the weights are replaced by their `hard()` values for the time and *all* quantizers are off,
those of activations and inside attention, too. What remains is a smooth network at the quantized point, and its Hessian H over the parameters that
require a gradient (scales are no part of it: nothing depends on them there). The model is in eval mode: no dropout, batch norm with its running
statistics. Figure 5 of Teacher Intervention (arXiv 2302.11812) shows eigenvalues of both signs; the one of largest size is given, with its sign.

    H v = d/dw (dL/dw . v)                   by exact double backward (Pearlmutter, Fast exact multiplication by the Hessian, 1994)
    q <- H q / |H q|                         power iteration
    theta = the Ritz value of largest size in span(q before, q)

The Rayleigh quotient q.Hq alone stands still at a wrong value where +a and -a are both eigenvalues, which the two vectors together tell apart; the
second costs no further product. It ends when theta moved by less than `tolerance` of itself in two steps running. As with every power
iteration, a tie within the tolerance may hide a slightly larger eigenvalue.

The trace is Hutchinson's estimate: the mean of v.Hv over random vectors v of +-1, whose expectation it is.

Attention runs through the plain product and softmax meanwhile: fused kernels have no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.error import QuantError, RunError
from ..core.quantizer import Quantizer
from ..layers.packed import Packed
from ..layers.quantized import Quantized
from ..model.probe import undisturbed
from ..model.quantized import quantized
from .tactic import Loss
from .task import Batch, device, moved
from .teacher import full_precision

CLOSE = 1e-3                                                      # below this sine two vectors are one: the Rayleigh quotient is right to its square


def sharpness(model: nn.Module, loss: Loss, batches: Sequence[Batch], *, steps: int = 200, tolerance: float = 1e-3, seed: int = 0) -> float:
    """The eigenvalue of largest size of the Hessian of the mean of `loss(model, batch)` over `batches`. The model is as before afterwards.

    loss: (model, batch) -> a mean: a task's `loss`, or what `fit` takes as loss. batches: a few, always the same; each counts alike. A product with
    the Hessian costs about three forwards and backwards of them all. seed: of the vector at the start.

    Raises:
        RunError: not settled within `steps`; no batches; a loss that is not finite; no parameter that requires a gradient.
        QuantError: packed layers, which have no weights to move, or adapters: merge them first.
    """
    with _smooth(model, loss, batches) as (times, weights):
        start = torch.randn(sum(w.numel() for w in weights), generator=torch.Generator().manual_seed(seed))
        return top(times, start.to(weights[0].device, weights[0].dtype), steps, tolerance)


def trace(model: nn.Module, loss: Loss, batches: Sequence[Batch], *, probes: int = 50, seed: int = 0) -> float:
    """The trace of the Hessian, from so many random vectors; arguments and errors as those of `sharpness`.

    >>> line = nn.Sequential(nn.Linear(3, 1, bias=False))
    >>> round(trace(line, lambda model, batch: model(batch["x"]).square().mean(), [{"x": torch.eye(3)}], probes=1), 4)
    2.0
    """
    with _smooth(model, loss, batches) as (times, weights):
        draw, n, total = torch.Generator().manual_seed(seed), sum(w.numel() for w in weights), 0.0
        for _ in range(probes):
            v = (torch.randint(0, 2, (n,), generator=draw) * 2.0 - 1).to(weights[0].device, weights[0].dtype)
            total += _dot(v, times(v))
        return total / probes


@contextmanager
def _smooth(model: nn.Module, loss: Loss, batches: Sequence[Batch]) -> Iterator[tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]]:
    """Inside, the model is the smooth network at the quantized point: the product with its Hessian, and the parameters that it is over."""
    batches = [moved(batch, device(model)) for batch in batches]
    with undisturbed(model), hardened(model), full_precision(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model.eval()
        weights = _weights(model)
        if not weights or not batches:
            raise RunError(f"sharpness over {len(weights)} parameters and {len(batches)} batches: give at least one batch, and a model with "
                           "parameters that require a gradient")
        yield lambda v: product(model, loss, batches, weights, v), weights


@contextmanager
def hardened(model: nn.Module) -> Iterator[None]:
    """Inside, the masters of all quantized layers hold what the layers compute with; afterwards the same memory is theirs again."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            raise QuantError(f"{name} is packed: it has codes and no weight to differentiate; take the model as it was before packing")
        if isinstance(module, Quantized) and module.slots.frozen is not None:
            raise QuantError(f"{name} is frozen ({module.slots.frozen}): it has no master to differentiate")
        if isinstance(module, Quantized) and module.adapter is not None:
            raise QuantError(f"{name} has an adapter, so its weight is a sum of parts; merge it first (layer.merge())")
    layers = [layer for layer in quantized(model).values() if layer.weight_quantizer is not None]
    values = [(layer.weight, layer.weight.data, layer.hard().detach().clone()) for layer in layers]
    try:
        for weight, _, value in values:
            weight.data = value
        yield
    finally:
        for weight, master, _ in values:
            weight.data = master


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, without scales, zeros and offsets."""
    steps = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters(recurse=False)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in steps]


def product(model: nn.Module, loss: Loss, batches: Sequence[Batch], weights: Sequence[Tensor], v: Tensor) -> Tensor:
    """H v of the mean loss over the batches, one batch at a time. v (n,), over all weights in their order."""
    parts = [piece.view_as(w) for piece, w in zip(v.split([w.numel() for w in weights]), weights, strict=True)]
    total = torch.zeros_like(v)
    for batch in batches:
        value = loss(model, batch)
        if not math.isfinite(float(value.detach())):
            raise RunError(f"the loss is {float(value.detach())} where sharpness is asked: there is no Hessian there")
        first = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
        live = [(g, part) for g, part in zip(first, parts, strict=True) if g is not None and g.requires_grad]
        if live:                                                  # else the loss is linear in all weights
            second = torch.autograd.grad([g for g, _ in live], weights, [part for _, part in live], allow_unused=True)
            total += torch.cat([torch.zeros_like(w).flatten() if s is None else s.flatten() for s, w in zip(second, weights, strict=True)])
    return total / len(batches)


def top(times: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float) -> float:
    """The eigenvalue of largest size of a symmetric map, by power iteration from `start` (n,).

    Raises:
        RunError: not settled within `steps`.

    >>> round(top(lambda v: torch.tensor([1.0, -3.0, 2.0]) * v, torch.ones(3), 99, 1e-6), 4)
    -3.0
    """
    q = start / start.norm()
    before: tuple[Tensor, Tensor] | None = None
    seen: list[float] = []
    for _ in range(steps):
        h = times(q)
        if not torch.isfinite(h).all():
            raise RunError("a product with the Hessian is not finite: the loss has no second derivative here")
        seen.append(_ritz(q, h, before))
        if len(seen) > 2 and all(abs(one - seen[-1]) <= tolerance * abs(seen[-1]) for one in seen[-3:-1]):
            return seen[-1]
        size = h.norm()
        if size == 0:
            return 0.0
        before, q = (q, h), h / size
    told = ", ".join(f"{value:.6g}" for value in seen[-3:])
    raise RunError(f"the top eigenvalue has not settled to {tolerance:g} of itself in {steps} steps; the last values are {told}. Give more steps, or "
                   "a larger tolerance")


def _ritz(q: Tensor, h: Tensor, before: tuple[Tensor, Tensor] | None) -> float:
    """The Ritz value of largest size in the span of q and the vector before, from their products h."""
    if before is None:
        return _dot(q, h)
    p, hp = before
    across = _dot(p, q)
    rest = q - across * p
    sine = math.sqrt(_dot(rest, rest))
    if sine < CLOSE:
        return _dot(q, h)
    e, he = rest / sine, (h - across * hp) / sine
    small = torch.tensor([[_dot(p, hp), _dot(p, he)], [_dot(p, he), _dot(e, he)]], dtype=torch.float64)
    return float(max(torch.linalg.eigvalsh(small).tolist(), key=abs))


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
