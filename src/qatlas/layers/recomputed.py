"""A product with a weight that is computed again in the backward pass, in place of being kept for it (keep="recompute").

A quantized weight is a short computation from a few tensors that live on anyway: the stored weight, its steps, an adapter. Autograd would keep
the quantized weight and what stands on the way to it (the sum with an adapter, the place on the grid), each as large as the weight, for all layers at
once. Here one function stands for the whole way. It saves the input and references to those few tensors, so that autograd notices where one of them
is written in between; its backward computes the weight anew, forms G = dL/dW once, and pulls it back through the closed forms of the quantizer and
the adapter. At any time there is one layer's weight in memory, not all of them: L4Q (arXiv 2402.04902), and what LR-QAT (arXiv 2406.06385) does by
checkpointing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .quantized import Quantized


class Recomputed(torch.autograd.Function):
    """(layer, x, the stored weight, all that its computed weight depends on) -> the layer's product. x is in the type of the product already."""

    @staticmethod
    def forward(ctx: Any, layer: Quantized, x: Tensor, *sources: Tensor) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.sources = layer, sources                  # what checkpointing gives back as saved is a copy off the graph
        ctx.save_for_backward(x, *sources)
        return layer.product(x, typed(layer.computed(), x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, sources = ctx.saved_tensors[0], ctx.sources            # raises where one was written since
        layer: Quantized = ctx.layer
        if torch.is_grad_enabled():                               # a second derivative: autograd's own way, which keeps what it needs
            asked = [t for t, needed in zip((x, *sources), ctx.needs_input_grad[1:], strict=True) if needed]
            given = iter(torch.autograd.grad(layer.product(x, typed(layer.computed(), x)), asked, g, create_graph=True, allow_unused=True))
            return None, *(next(given) if needed else None for needed in ctx.needs_input_grad[1:])
        wanted = [s for s, needed in zip(sources, ctx.needs_input_grad[2:], strict=True) if needed]
        with torch.enable_grad():
            w = layer.computed()
            w = w if wanted else w.detach()
            dx, dw, dbias = layer.pulled(g, x, typed(w.detach(), x), ctx.needs_input_grad[1])
            own = [s for s in wanted if s is not layer.bias]
            dw = dw.to(w.dtype)
            grads = torch.autograd.grad(w, own, dw, allow_unused=True) if w.requires_grad else ()
        found: dict[int, Tensor | None] = {id(s): grad for s, grad in zip(own, grads, strict=False)}
        found[id(layer.bias)] = None if dbias is None else dbias.to(layer.bias.dtype)
        return None, dx, *(found.get(id(s)) if needed else None for s, needed in zip(sources, ctx.needs_input_grad[2:], strict=True))


def typed(w: Tensor, x: Tensor) -> Tensor:
    """The weight in the type of x; ids have none."""
    return w.to(x.dtype) if x.is_floating_point() else w


def product(layer: Quantized, x: Tensor) -> Tensor:
    """The layer's product with its computed weight, by `Recomputed`."""
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    parts = [part for part in (layer.weight_quantizer, layer.adapter, layer.transform) if part is not None]
    sources = [layer.weight, *(p for part in parts for p in part.parameters()), *(() if layer.bias is None else (layer.bias,))]
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = Recomputed.apply(layer, x, *sources)          # type: ignore[no-untyped-call]
    return y
