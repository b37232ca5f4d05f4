"""Compiled fake quantization: the lines of the formula as one pass over memory each, by torch.compile; the rest of the model stays as it is.

Eager, the formula reads and writes a tensor about seven times forward and fifteen times backward (place, rounding, clipping, masks, products). Its
arithmetic is nothing, its memory traffic is the cost of training with quantization (docs/performance.md). Compiled, forward reads x and writes y,
and backward reads g and x and writes dx and the sums. Nothing more is saved than by eager: x and the scales; the place u is computed again.
Compiling a whole model would be faster still, and takes minutes for each model and shape; these few lines take seconds, once for each Quant, because
they are compiled for tensors of any size.

Eager stays the reference, and the values must be its values bit for bit, for codes, files and proofs are made by eager lines:

    values     elementwise, so that no order of sums can differ. The compiler must neither fuse a product and a sum into one rounding nor
               replace a division by a product; inductor does neither on CPU unless told to
    gradients  those of x bit for bit, those of scales and zeros up to the order of their sums (1e-6)
    not        a refit is a sum that moves the values: its forward stays eager. The measure of a fresh scale, small against the rest, too.
               Scales that are themselves quantized (`nested`) stay eager both ways

What is claimed here about a compiler is not believed: `compiled` holds each Quant against the eager lines on a sample with ties and ends, on the
device where the model lies, and refuses at the first value that differs. The same call is what compiles, so that training finds it done.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..core import again
from ..core.error import QuantError
from ..core.estimator import forward, passing, pull, values
from ..core.quantizer import Quant, Quantizer
from ..core.scale import Place

MANY = 64                                                         # the compiler uses several threads where the first call has work for them


class Compiled:
    """The formula of one Quant, compiled: what core.estimator.Formula asks for."""

    def __init__(self, quant: Quant) -> None:
        self.quant, self.fresh = quant, True

        def values(y: Tensor, x: Tensor, s: Tensor, zero: Tensor | None, offset: Tensor | None, shift: Tensor | None) -> None:
            y.copy_(forward(x, Place(s, zero, offset), shift, quant)[0])

        def pulled(dx: Tensor | None, g: Tensor, x: Tensor, s: Tensor, zero: Tensor | None, offset: Tensor | None,
                   shift: Tensor | None) -> list[Tensor | None]:
            own, *rest = pull(g, x, Place(s, zero, offset), shift, quant, 1.0)
            if dx is not None and own is not None:
                dx.copy_(own)
            return rest

        self._values, self._pull = _compile(values), _compile(pulled)

    @torch.no_grad()
    def values(self, x: Tensor, place: Place, shift: Tensor | None, into: Tensor | None = None) -> Tensor:
        """y of (..., n), in memory that is given, or new."""
        if self.quant.refit:
            return values(x, place, shift, self.quant, into)
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if into is None else into
        self._values(*_rows(y, x, *place, shift, sizes=self.fresh))
        return y

    @torch.no_grad()
    def pull(self, g: Tensor, x: Tensor, place: Place, shift: Tensor | None, strength: float) -> tuple[Tensor | None, ...]:
        """The gradients of (x, s, zero, offset, shift). The strength is a number of each shape, which the compiler need not see."""
        dx = None if passing(self.quant) else again.empty(x)
        *sums, dshift = self._pull(*_rows(dx, g, x, *place, shift, sizes=self.fresh))
        sums = [None if t is None else (t * strength).view(*x.shape[:-1], 1) for t in sums]
        return g if dx is None else dx, *sums, None if dshift is None else dshift.view(x.shape)


@contextmanager
def compiled(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts, the quantizers of `model` run compiled. A model may be trained and judged inside; codes are the same in and out.

    Raises:
        QuantError: a compiler that is missing or fails, or gives other values than the eager lines.
    """
    found = [module for module in model.modules() if isinstance(module, Quantizer) and module.formula is None]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    able = [q for q in found if q.quant.scale.nested is None and q.quant.scale.offset_nested is None]
    if len(able) < len(found):
        warnings.warn(f"{len(found) - len(able)} of {len(found)} quantizers have scales that are quantized themselves; they run eager", stacklevel=3)
    formulas: dict[Quant, Compiled] = {}
    try:
        for quantizer in able:
            if quantizer.ready and quantizer.quant not in formulas:
                formulas[quantizer.quant] = check(Compiled(quantizer.quant), device)
            quantizer.formula = formulas.get(quantizer.quant)
        yield model
    finally:
        for quantizer in found:
            quantizer.formula = None


@torch.no_grad()
def check(formula: Compiled, device: torch.device) -> Compiled:
    """The formula, held against the eager lines.

    Raises:
        QuantError: see `compiled`.
    """
    quant = formula.quant
    view, g = sample(quant, device).repeat(MANY, 1), torch.linspace(-1, 1, 64 * 6, device=device).reshape(6, 64).repeat(MANY, 1)
    place = quant.measure(view)
    y = forward(view, place, None, quant)[0]
    hears = not quant.estimator.blind or quant.scale.keeps == "parameter"        # else backward is the incoming gradient; compiled if ever asked for
    try:
        values, pulled = formula.values(view, place, None), formula.pull(g, view, place, None, 1.0) if hears else ()
    except Exception as error:                                    # the compiler's own are of many kinds
        raise QuantError(f"the fake quantization of {quant.label} does not compile here ({type(error).__name__}: {str(error).strip()[:300]}). "
                         "torch.compile needs a C++ compiler on CPU (g++ or clang++, or the one that CXX names); or leave compile out") from error
    if not torch.equal(values, y):
        raise QuantError(f"the compiled fake quantization of {quant} gives other values than the eager one in {int((values != y).sum())} of "
                         f"{y.numel()} places on {device.type}; codes would not be those that are exported. Leave compile out")
    for ours, eager in zip(pulled, pull(g, view, place, None, quant, 1.0), strict=False):
        if eager is not None and not torch.allclose(ours, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max())):  # type: ignore[arg-type]
            raise QuantError(f"the compiled gradients of {quant} differ from the eager ones by {float((ours - eager).abs().max()):.3g} "  # type: ignore
                             f"on {device.type}. Leave compile out")
    formula.fresh = False
    return formula


def sample(quant: Quant, device: torch.device) -> Tensor:
    """(6, 64): normal numbers, and rows of exact ties, of the grid's own values, of zeros and of what lies far outside."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(64.0) - 32
    x[1], x[2], x[3], x[4] = (steps / 2) / 32, steps / 32 * max(abs(quant.grid.low), quant.grid.high), 0.0, x[4] * 1e-3
    x[5, :2] *= 1e4
    return x.to(device)


@lru_cache(1)
def _early() -> Any:
    """A pass of the compiler that writes an answer into its memory as soon as it is known. It makes one loop of two neighbours, of an elementwise one
    and then a sum, not of a sum and what follows; and it puts writes last, so that gradient and sums would be two passes over the weight."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Early(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            for node in list(graph.nodes):
                if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder" and node.args[1].op == "call_function":
                    node.args[1].append(node)

        def uuid(self) -> str:
            return f"qatlas.early.2, {torch.get_num_threads()} threads"          # a key of the compiler's cache, which forgets the threads

    return Early()


def _compile(function: Any) -> Any:
    """For any sizes, in one graph. Each gets a code object of its own: the compiler counts recompilations by code object, and what one Quant needed
    must not stand in the way of the next."""
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    return torch.compile(own, fullgraph=True, options={"post_grad_custom_post_pass": _early()})


def _rows(*tensors: Tensor | None, sizes: bool = False) -> list[Tensor | None]:
    """As rows, without graph or class: one compilation serves parameters, activations and kept weights. sizes: tell the compiler, at its first call,
    that they may be any; numbers that belong to the Quant stay constants."""
    rows = [None if t is None else t.detach().reshape(-1, t.shape[-1]) for t in tensors]
    for t in rows:
        for axis in range(2 if sizes and t is not None else 0):
            torch._dynamo.maybe_mark_dynamic(t, axis) if t.shape[axis] > 1 else None  # type: ignore[union-attr]
    return rows
