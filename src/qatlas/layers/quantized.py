"""Quantized: what every layer with quantized numbers has in common. A layer's own file adds one line, its product.

    x -> norm -> transform -> input quantizer -> product with the kept weight -> adapter beside -> output quantizer

The weight that enters the product is computed from the fp32 master, which stays where it was, under its own name and in its own layout:

    master -> adapter inside -> transform -> quantizer (adapter in the grid shifts the place) -> adapter after

`keep` says how the quantized weight is kept:

    each        quantized in every forward. The default.
    buffer      quantized once per write of the weights: the forward returns a buffer that lives across steps, the backward pulls the gradient back
                through the same closed form. A write is noticed by the version counters of the master, the scales and the adapter; whoever writes
                through `.data` (which no counter sees) calls `refresh()`. Costs one copy of the weights. `fit` does so with what says "each"
    recompute   nothing of the weight's size is saved for backward but the stored weight itself; the rest is computed again (recomputed.py). A moving
                scale moves in every forward and cannot be asked twice: such a layer goes on as "each"

`frozen` says that the weight itself is not trained, and how it is stored (frozen.py): `weight` is then a buffer in the place of the fp32 master.

A layer is made from an existing one with `of`, which shares its parameters, hooks and attributes: nothing is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.noun import Noun
from ..core.qtensor import QTensor
from ..core.quantizer import Known, Quant, Quantizer
from ..core.transform import Maps, Transform
from ..kernels.rotation import quick
from .adapter import Adapter, AdapterSpec
from .frozen import Frozen
from .norm import Norm
from .recomputed import product, typed
from .rows import Rows, RowsQuantizer

if TYPE_CHECKING:
    from .packed import Packed

KEEP = ("each", "buffer", "recompute")


@dataclass(frozen=True)
class Slots(Noun):
    """What is said about one layer: its Quants, transform, adapter, how the quantized weight is kept, the norm in front, how a frozen weight is
    stored. None is full precision, or nothing."""

    weight: Quant | Rows | None = None
    input: Quant | None = None
    output: Quant | None = None
    transform: Transform | None = None
    adapter: AdapterSpec | None = None
    keep: str = "each"
    norm: Norm | None = None
    frozen: Frozen | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise QuantError(f"keep={self.keep!r}: a quantized weight is kept by one of {', '.join(KEEP)}")

    def maps(self, weight: Tensor, peak: Tensor | None = None) -> Maps | None:
        """The maps of the transform for a layer of this weight, turned by the kernel where it can."""
        return None if self.transform is None else quick(self.transform.build(weight, peak))


class Layer(nn.Module):
    """The way through a layer, for trainable and packed ones. Subclasses give `computed` and `product`."""

    slots: Slots
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None
    transform: Maps | None
    adapter: Adapter | None
    norm: nn.Module | None

    def computed(self) -> Tensor:
        """The weight that enters the product, (out, ...)."""
        raise NotImplementedError

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """The layer's own operation with a weight in (out, ...) layout."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        q = x if self.transform is None else self.transform.of_input(x).to(x.dtype)
        q = q if self.input_quantizer is None else self.input_quantizer(q)
        y = self.multiply(q)
        y = y if self.adapter is None else self.adapter.beside(x, q, y)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def multiply(self, q: Tensor) -> Tensor:
        """The product with the computed weight."""
        return self.product(q, self.computed())


class Quantized(Layer):
    """A trainable layer: `weight` is the fp32 master, or what is stored of a frozen one."""

    replaces: ClassVar[type[nn.Module]]
    weight: Any                                                   # nn.Parameter; the torch class behind it declares it
    bias: Any
    weight_quantizer: Quantizer | RowsQuantizer | None
    _known: Known | None
    _stamp: tuple | None
    meet: Any = None                                              # what a kept value passes on its way into the product (gathered.py)
    waiting: Any = None
    ahead: bool = False                                           # whether what is kept is refreshed before a graph runs (ahead.py)

    @classmethod
    def of(cls, module: nn.Module, slots: Slots, peak: Tensor | None = None) -> Any:
        """Make a quantized layer out of `module`, sharing all it has. peak (in,): max|x| of each input channel, where the transform asks for it.

        Raises:
            QuantError: a weight with NaN, a group that does not divide, a transform that has nothing to act on.
        """
        layer = cls.__new__(cls)
        layer.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
        layer._set(slots, peak)
        return layer

    def _set(self, slots: Slots, peak: Tensor | None) -> None:
        self.slots, self._known, self._stamp = slots, None, None
        if self.weight.dtype != torch.float64 and slots.frozen is None:
            self.weight.data = self.weight.data.float()            # masters are fp32: a bf16 master does not move at learning rate 1e-5
        if slots.transform is not None and self.matrix().dim() != 2:
            raise QuantError(f"a transform acts on linear layers only, not on {type(self).__name__}")
        if slots.norm is not None and slots.transform is not None and slots.transform.needs_peak:
            raise QuantError(f"{type(slots.transform).__name__} looks at the inputs as they come, the norm would change them; take one of the two")
        self.norm = None if slots.norm is None else slots.norm.build(self.matrix())
        self.transform = slots.maps(self.matrix().detach(), peak)
        self.adapter = slots.adapter.build(self.matrix().detach()) if slots.adapter is not None else None
        for name in ("weight", "input", "output"):
            quant = getattr(slots, name)
            setattr(self, f"{name}_quantizer", None if quant is None else quant.build())
        if slots.frozen is not None:
            self.weight_quantizer = None if slots.weight is None else slots.frozen.build(slots.weight)
            slots.frozen.freeze(self)
        elif self.weight_quantizer is not None:
            self.weight_quantizer.initialise(self.source().detach())

    @property
    def master(self) -> Tensor:
        """The weight as numbers, in its own layout: the master itself, or what a frozen store reads (places on the grid, for `Places`)."""
        return self.weight if self.slots.frozen is None or "weight" in self._parameters else self.slots.frozen.read(self.weight)

    def hold(self, stored: Tensor) -> None:
        """Put a frozen store, (out, ...) layout, in the place of the weight."""
        for tensors in (self._parameters, self._buffers):
            tensors.pop("weight", None)
        self.register_buffer("weight", self.unmatrix(stored).contiguous())
        self.refresh()

    def thaw(self, w: Tensor) -> None:
        """Put an fp32 master, (out, ...) layout, in the place of a frozen store."""
        self._buffers.pop("weight", None)
        self.slots = self.slots.but(frozen=None)
        self.weight = nn.Parameter(self.unmatrix(w).detach().clone(memory_format=torch.contiguous_format))
        self.refresh()

    def matrix(self) -> Tensor:
        """The master in (out, ...) layout."""
        return self.master

    def unmatrix(self, w: Tensor) -> Tensor:
        """(out, ...) layout -> the master's own."""
        return w

    def source(self) -> Tensor:
        """What the quantizer sees: the master with its adapter and transform."""
        w = self.matrix() if self.adapter is None else self.adapter.inside(self.matrix())
        return w if self.transform is None else self.transform.of_weight(w)

    def computed(self) -> Tensor:
        w = self.source() if self.weight_quantizer is None else self.quantized()
        return w if self.adapter is None else self.adapter.after(w)

    def quantized(self) -> Tensor:
        """The weight as its quantizer gives it, fresh or kept."""
        w = self.source()
        assert self.weight_quantizer is not None
        shift = None if self.adapter is None else self.adapter.shift(w)
        follows = any(True for _ in self.weight_quantizer.buffers())          # a moving scale moves in every forward: nothing to keep
        known = None
        if self.keep == "buffer" and self.weight_quantizer.on and not follows:
            if not torch.compiler.is_compiling():
                known = self._keep(w, shift)
            elif self.ahead:                                      # a graph cannot ask whether something was written: ahead.py asks before it runs
                known = self._known
        w = self.weight_quantizer(w, shift, known)
        return w if known is None or self.meet is None or torch.compiler.is_compiling() else self.meet(w)

    @torch.no_grad()
    def fill(self) -> None:
        """Quantize what is kept, where it was written since."""
        if self.keep == "buffer" and self.weight_quantizer is not None and self.weight_quantizer.on:
            self.quantized()

    def multiply(self, q: Tensor) -> Tensor:
        numbers = () if self.weight_quantizer is None else self.weight_quantizer.modules()
        moving = any(isinstance(q, Quantizer) and q.quant.scale.keeps == "buffer" for q in numbers)
        if self.keep == "recompute" and torch.is_grad_enabled() and not moving and not torch.compiler.is_compiling():
            return product(self, q)
        return self.product(q, typed(self.computed(), q))         # a model in bf16 computes in bf16, from fp32 masters

    def pulled(self, g: Tensor, x: Tensor, w: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The gradients of a product y of x and w, from that of y: of x where it is wanted, w, and the bias where there is one."""
        x, w = x.detach().requires_grad_(wanted), w.detach().requires_grad_()
        parts = [*((x,) if wanted else ()), w, *(() if self.bias is None else (self.bias,))]
        grads = dict(zip(map(id, parts), torch.autograd.grad(self.product(x, w), parts, g, allow_unused=True), strict=True))
        return grads.get(id(x)), grads[id(w)], grads.get(id(self.bias))

    @property
    def keep(self) -> str:
        """each, buffer or recompute; may be set."""
        return self.slots.keep

    @keep.setter
    def keep(self, how: str) -> None:
        self.slots, self._known, self._stamp = self.slots.but(keep=how), None, None

    def refresh(self) -> None:
        """Forget the kept weight; the next forward quantizes afresh."""
        self._stamp = None

    def hard(self) -> Tensor:
        """The weight that the layer computes with: in the master's own space and layout, without a graph."""
        with torch.no_grad():
            w = self.source()
            if self.weight_quantizer is not None:
                w = self.weight_quantizer.hard(w, None if self.adapter is None else self.adapter.shift(w))
            w = w if self.transform is None else self.transform.back(w)
            return self.unmatrix(w if self.adapter is None else self.adapter.after(w))

    @torch.no_grad()
    def latent(self) -> Tensor:
        """The weight itself before quantizer and adapter, as `hard`: the master, or what a frozen store stands for."""
        return self.weight.detach() if self.slots.frozen is None else self.unmatrix(self.slots.frozen.latent(self))

    @torch.no_grad()
    def quantize(self) -> QTensor:
        """The codes of the weight as the quantizer sees it, (out, ...) layout."""
        if self.weight_quantizer is None:
            raise QuantError(f"this {type(self).__name__} keeps its weight in full precision; it has no codes")
        w = self.source()
        return self.weight_quantizer.quantize(w, None if self.adapter is None else self.adapter.shift(w))

    def pack(self) -> Packed:
        """The layer with codes instead of a master."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the adapter into the master (see Adapter.merged) and see that the codes stay.

        Raises:
            QuantError: an adapter that cannot merge, or whose merging would move codes; the layer is then as it was.
        """
        if self.adapter is None:
            return
        kept: list[tuple[Any, Any]] = [(home, home.copy()) for home in (self.__dict__, self._parameters, self._buffers, self._modules)]
        tensor, before = self.weight, self.weight.clone()
        codes = None if self.weight_quantizer is None else self.quantize().codes
        if self.slots.frozen is not None and self.adapter.merges:
            self.slots.frozen.merge(self)
        else:
            self.weight.copy_(self.unmatrix(self.adapter.merged(self.matrix(), self)))
        self.adapter, self.slots = None, self.slots.but(adapter=None)
        self.refresh()
        if codes is not None and not torch.equal(self.quantize().codes, codes):
            for home, was in kept:
                home.clear()
                home.update(was)
            tensor.copy_(before)
            self.refresh()
            raise QuantError("merging would move codes: the adapter is in the grid, and the scale is measured anew from the merged weight; "
                             "train with a Learned scale, or pack the layer as it is")

    @torch.no_grad()
    def _keep(self, w: Tensor, shift: Tensor | None) -> Known:
        assert self.weight_quantizer is not None
        parts = [self.weight, *self.weight_quantizer.parameters(), *(self.adapter.parameters() if self.adapter is not None else ())]
        quants = tuple(q.quant for q in self.weight_quantizer.modules() if isinstance(q, Quantizer))        # bits may be switched
        stamp = (quants, *((id(part), part._version, part.device, part.dtype) for part in parts))
        if self._stamp != stamp or self._known is None:
            old = None if self._known is None else self._known.value
            fits = old is not None and (old.shape, old.device, old.dtype) == (w.shape, w.device, w.dtype)
            self._stamp = None                                    # what is half written belongs to nobody
            self._known, self._stamp = self.weight_quantizer.known(w.detach(), shift, old if fits else None), stamp
        return self._known

    def bias_in(self, x: Tensor) -> Tensor | None:
        """The bias, in the type of x."""
        return None if self.bias is None else self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, keep={self.keep}"


@contextlib.contextmanager
def kept(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While it lasts, layers that would quantize in each forward keep a buffer. An embedding that quantizes only the rows it looks up goes on so."""
    layers = [m for m in model.modules() if wanted and isinstance(m, Quantized) and m.keep == "each" and not getattr(m, "by_row", False)]
    for layer in layers:
        layer.keep = "buffer"
    try:
        yield
    finally:
        for layer in layers:
            layer.keep = "each"
