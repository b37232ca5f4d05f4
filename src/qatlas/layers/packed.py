"""Packed layers: codes as buffers, scales as parameters, no master. What is saved, loaded and served.

A packed layer holds a Store (store.py). It dequantizes and multiplies: correct before fast, bit for bit what the trained layer computes. Whoever
wants it fast says so (kernel.py, model/fast.py). Where there is a graph it is dequantized once more in the backward, so that nothing of a weight's
size waits for it: training steps on a packed model needs memory for codes and activations. Its `to_meta` says in JSON all that its tensors do not,
and `from_meta` builds the same layer empty, to be filled by load_state_dict.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.noun import from_json
from ..core.qtensor import Masked, QTensor
from ..core.quantizer import Quantizer
from .kernel import Kernel
from .quantized import Layer, Quantized, Slots
from .store import MaskedStore, Store, stored


class Packed(Layer):
    """What all packed layers share; subclasses give `product` and `conf`, the plain attributes that the product needs."""

    conf: tuple[str, ...] = ()
    kernel: Kernel | None = None                                  # set by model/fast.py
    answer: torch.dtype | None = None                             # the type in which a layer without a floating input answers; None is fp32

    @classmethod
    def of(cls, q: QTensor | Masked, bias: Tensor | None, layer: Quantized) -> Any:
        """From the codes of a trained layer, sharing its quantizers, transform and adapter (but one that is in the codes already)."""
        packed, merged = cls(), layer.adapter is not None and layer.adapter.merges
        packed.slots = layer.slots.but(frozen=None, adapter=None if merged else layer.slots.adapter)
        packed.store, packed.bias = stored(q), bias if bias is None else nn.Parameter(bias.detach().clone())
        for name in cls.conf:
            setattr(packed, name, getattr(layer, name))
        packed.input_quantizer, packed.output_quantizer = layer.input_quantizer, layer.output_quantizer
        packed.transform, packed.adapter, packed.norm = layer.transform, None if merged else layer.adapter, layer.norm
        return packed.train(layer.training)

    @classmethod
    def holding(cls, q: QTensor | Masked, module: nn.Module, slots: Slots) -> Any:
        """From codes that were not trained here, in the place of a full-precision module of the same operation; slots say what the codes are, and how
        the input is quantized."""
        packed = cls()
        packed.slots, packed.store = slots, stored(q)
        bias = getattr(module, "bias", None)
        packed.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in cls.conf:
            setattr(packed, name, getattr(module, name))
        packed.input_quantizer = None if slots.input is None else slots.input.build()
        return packed.train(module.training)

    def __init__(self) -> None:
        super().__init__()
        self.store: Any                                           # Store or MaskedStore
        self.bias: Tensor | None = None
        self.input_quantizer = self.output_quantizer = None
        self.transform, self.adapter, self.norm = None, None, None

    def qtensor(self) -> Any:
        """The weight as data, (out, ...)."""
        return self.store.qtensor()

    @property
    def weight(self) -> Tensor:
        """The values of the weight, (out, ...), in the type of the model: for models that read `layer.weight.dtype` in their forward (ViT, GPT-2)."""
        w = self.store.values()
        w = w if self.transform is None else self.transform.back(w)
        return w.to(self.answer or w.dtype)

    def computed(self) -> Tensor:
        w = self.store.qtensor().dequantize()
        return w if self.adapter is None else self.adapter.after(w)

    def multiply(self, q: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().multiply(q)
        if not torch.is_grad_enabled():
            plain = self.adapter is None and q.is_floating_point()
            w = self.store.values(q.dtype if plain else None)
            return self.product(q, w if self.adapter is None else self.adapter.after(w))
        return checkpoint(super().multiply, q, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def hard(self) -> Tensor:
        """The weight that the layer computes with, (out, ...), in the original space, without a graph."""
        with torch.no_grad():
            w = self.store.values()
            w = w if self.transform is None else self.transform.back(w)
            return w if self.adapter is None else self.adapter.after(w)

    def to_meta(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        conf = {name: value if not isinstance(value := getattr(self, name), tuple) else list(value) for name in self.conf}
        quants = {name: q.quant.to_json() for name in ("input", "output") if (q := getattr(self, f"{name}_quantizer")) is not None}
        return {"layer": type(self).__name__, "tensor": self.store.to_meta(), "slots": self.slots.to_json(), "bias": self.bias is not None,
                "conf": conf, "quants": quants, **steps_of(self)}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Any:
        """An empty packed layer of the class that the meta names."""
        kind = {sub.__name__: sub for sub in Packed.__subclasses__()}[meta["layer"]]
        packed = kind()
        packed.slots = from_json(meta["slots"])
        packed.store = (MaskedStore if "count" in meta["tensor"] else Store).from_meta(meta["tensor"])
        out = meta["tensor"]["shape"][0]
        packed.bias = nn.Parameter(torch.zeros(out)) if meta["bias"] else None
        for name, value in meta["conf"].items():
            setattr(packed, name, tuple(value) if isinstance(value, list) else value)
        slots: Slots = packed.slots
        packed.norm = None if slots.norm is None else slots.norm.build(torch.empty(tuple(meta["tensor"]["shape"])))
        with torch.device("cpu"):                                 # these look at values; an empty layer may be asked for on the meta device
            for name, quant in meta["quants"].items():
                setattr(packed, f"{name}_quantizer", blank_quantizer(quant, name, meta))
            if slots.transform is not None or slots.adapter is not None:
                like = torch.ones(tuple(meta["tensor"]["shape"]))
                packed.transform = slots.maps(like, like[0])
                packed.adapter = slots.adapter.build(like) if slots.adapter is not None else None
        return packed

    def extra_repr(self) -> str:
        return f"{self.store.grid}, {self.store.grain}, shape={self.store.shape}"


def steps_of(layer: Layer) -> dict[str, Any]:
    """{"steps": slot -> shape}, of static activation quantizers with more than one step, {"states": slot -> name -> shape} of those that hold more
    than steps; else nothing."""
    found = {name: q for name in ("input", "output") if (q := getattr(layer, f"{name}_quantizer")) is not None}
    steps = {name: list(q.scale.shape) for name, q in found.items() if type(q) is Quantizer and q.scale is not None and q.scale.numel() > 1}
    states = {name: {key: list(t.shape) for key, t in q.state_dict().items()} for name, q in found.items() if type(q) is not Quantizer}
    return ({"steps": steps} if steps else {}) | ({"states": states} if states else {})


def blank_quantizer(quant: dict[str, Any], slot: str, meta: dict[str, Any]) -> Quantizer:
    """The quantizer of activations in a slot of a layer's meta, with state of the right shape."""
    quantizer: Quantizer = from_json(quant).build()
    if (state := meta.get("states", {}).get(slot)) is not None:
        quantizer.load_state_dict({name: torch.ones(shape) for name, shape in state.items()})
    elif quantizer.quant.scale.keeps != "nothing":
        quantizer.initialise(torch.ones(tuple(meta.get("steps", {}).get(slot) or (1,))))
    return quantizer


class PackedLinear(Packed):
    """(..., in) -> (..., out) from packed codes."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None or not self.kernel.serves(x):
            return super().forward(x)
        x = x if self.norm is None else self.norm(x)
        x = x if self.transform is None else self.transform.of_input(x).to(x.dtype)
        y = self.kernel(x, self.bias)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype), self.bias)


class PackedConv1d(Packed):
    """As nn.Conv1d."""

    conf = ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return _convolve(F.conv1d, self, x, w)


class PackedConv2d(Packed):
    """As nn.Conv2d."""

    conf = ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return _convolve(F.conv2d, self, x, w)


def _convolve(conv: Any, layer: Any, x: Tensor, w: Tensor) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return conv(x, w.to(x.dtype), layer.bias, layer.stride, padding, layer.dilation, layer.groups)


class PackedEmbedding(Packed):
    """ids (...) -> (..., width). Without a graph the rows that are asked for are dequantized, and no others: the same values."""

    conf = ("padding_idx",)
    padding_idx: int | None

    def multiply(self, q: Tensor) -> Tensor:
        few = not torch.is_grad_enabled() and self.adapter is None and q.numel() < self.store.shape[0]
        found = self.store.rows(q.flatten()) if few else None
        if found is None:
            return super().multiply(q)
        w = found.dequantize()
        return w.to(self.answer or w.dtype).view(*q.shape, *w.shape[1:])

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.embedding(x, w, self.padding_idx).to(self.answer or w.dtype)
