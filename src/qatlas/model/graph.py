"""Graph: a quantized model as an ONNX graph in full precision, for formats that hold the whole computation.

    graph(model, 21) -> export.checkpoint.Graph

The packed model is copied and shown to torch.onnx as what it means: each packed layer has its dequantized weight as a plain parameter, each quantizer
of activations is one node `qatlas::Quantize` with its address as attribute `of`. Nothing is folded (`optimize=False`), so that each initializer
keeps the name of its tensor, and tensors that are one have the name that `checkpoint` gives them. The numbers are not here: the exporter puts the
trained codes in the place of the weights, and what the format has in the place of the marks.

Inputs are those of the tokenizer that the model takes (input_ids, attention_mask, token_type_ids), with the batch and the tokens left open, or the
pixels of an image, with the batch left open, and the sides where the config names no size; the output is `logits`. A decoder has no cache.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import FormatError, QuantError
from ..core.estimator import settle
from ..core.place import Place
from ..core.quantizer import Quantizer
from ..export.checkpoint import DOMAIN, MARK, Graph, Signal
from ..layers.packed import Packed
from ..layers.store import Store
from . import artefact
from .pack import pack
from .probe import inputs, sized

NOISY = "torch.onnx._internal.exporter._registration"             # says for each operator of torchvision that torchvision is not there
ROOT = "whole"


def graph(model: nn.Module, opset: int, batch: dict[str, Tensor] | None = None) -> Graph:
    """The computation of a quantized model, trainable or packed; the model stays as it is.

    Args:
        opset: of ONNX, in which the graph speaks.
        batch: inputs by name, two rows at least; without it a transformers model's own kind of inputs is made.

    Raises:
        QuantError: a model without quantized layers. FormatError: torch cannot trace the model, or the extra is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise FormatError(f"an ONNX graph needs {error.name}, which is not installed: pip install 'qatlas[onnx]'") from None
    batch = inputs(model) if batch is None else batch
    shown, signals = plain(model)
    whole = Whole(shown, tuple(batch))
    with torch.no_grad(), quiet():
        whole(*batch.values())                                    # attention compares itself with the model's own here, which no trace can
        try:
            program = torch.onnx.export(whole, tuple(batch.values()), dynamo=True, opset_version=opset, optimize=False, verbose=False,
                                        input_names=list(batch), output_names=["logits"],
                                        dynamic_shapes={"given": tuple(_open(model, x) for x in batch.values())})
        except Exception as error:
            said = str(error.__cause__ or error).strip().splitlines() or [""]
            raise FormatError(f"torch.onnx cannot trace {type(model).__name__}: {type(error.__cause__ or error).__name__}: {said[0]}") from error
    assert program is not None
    _rename(program.model.graph, whole)
    return Graph(program.model, signals)


class Whole(nn.Module):
    """Inputs by place -> logits alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.whole, self.names = model, names

    def forward(self, *given: Tensor) -> Tensor:
        out = self.whole(**dict(zip(self.names, given, strict=True)))
        return out if isinstance(out, Tensor) else out.logits


class _Mark(nn.Module):
    """The place of a quantizer."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return x
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{MARK}", (x,), {"of": self.address}, dtype=x.dtype, shape=x.shape, version=1)


class _Plain(nn.Module):
    """A Store shown as the values that it stands for; it answers as Store and QTensor do."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.grid, self.grain, self.shape = store.grid, store.grain, store.shape
        self.weight = nn.Parameter(store.qtensor().dequantize().detach())

    def qtensor(self) -> _Plain:
        return self

    def dequantize(self) -> Tensor:
        return self.weight

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.to(dtype or self.weight.dtype)

    def rows(self, at: Any) -> None:
        return None


def plain(model: nn.Module) -> tuple[nn.Module, dict[str, Signal]]:
    """A copy with plain weights and marks, and what the marks stand for."""
    if not artefact.holds(model):
        raise QuantError(f"this {type(model).__name__} has no quantized layer; quantize(model, rules) comes first")
    shown: Any = nn.Module.float(pack(copy.deepcopy(model)))           # transformers forbids .float() of a packed model
    if hasattr(shown, "config"):
        shown.config.use_cache = False
    signals: dict[str, Signal] = {}
    known: dict[int, _Plain] = {}
    for name, module in list(shown.named_modules()):
        if isinstance(module, Packed):
            module.store = known.setdefault(id(module.store), _Plain(module.store))  # type: ignore[assignment]
            module.answer = None
        for slot, quantizer in list(module._modules.items()):
            if isinstance(quantizer, Quantizer):
                address = f"{name}:{slot.removesuffix('_quantizer')}"
                setattr(module, slot, _Mark(address) if quantizer.on else nn.Identity())
                if quantizer.on:
                    signals[address] = signal(quantizer, address)
    return shown, signals


def signal(quantizer: Quantizer, address: str) -> Signal:
    """A quantizer of activations as data: the step as it computes with it, in the type that is stored.

    Raises:
        QuantError: a quantizer with a formula of its own, or one that was never calibrated.
    """
    if type(quantizer) is not Quantizer:
        raise QuantError(f"{address}: a {type(quantizer).__name__} has a formula of its own, which no graph can be told")
    if not quantizer.ready:
        raise QuantError(f"{address}: this quantizer was never calibrated; run calibrate(model, task) first")
    if quantizer.scale is None:
        return Signal(quantizer.quant)
    place = settle(Place.of(quantizer.scale, quantizer.zero, quantizer.offset, torch.float32), quantizer.quant)
    return Signal(quantizer.quant, *(None if t is None else t.detach().squeeze(-1) for t in place))


def _open(model: nn.Module, x: Tensor) -> dict[int, str]:
    """Axis -> name, of what the graph leaves open."""
    if not x.is_floating_point():
        return {0: "batch", 1: "tokens"}
    return {0: "batch", 2: "height", 3: "width"} if x.dim() == 4 and not sized(model) else {0: "batch"}


def names(whole: nn.Module) -> dict[str, str]:
    """Parameter or buffer of a shown model -> the first name of its tensor in the state of the model; a packed weight has its layer's name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name.removeprefix(f"{ROOT}.").replace(".store.weight", ".weight"))
            for name, tensor in whole.state_dict(keep_vars=True).items()}


def _rename(found: Any, whole: nn.Module) -> None:
    """Give each initializer the name of its tensor."""
    known = names(whole)
    for name, value in list(found.initializers.items()):
        to = known.get(name, name.removeprefix(f"{ROOT}."))
        if to != name:
            del found.initializers[name]
            value.name = to
            found.initializers[to] = value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings that speak of the exporter's own work are not for the user."""
    logger = logging.getLogger(NOISY)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
