"""Further: a packed model, ours or a foreign one, trained on from exactly its codes and steps. Three ways:

    fit(model, task, train="*.scale")             the steps alone, codes fixed (the second phase of EfficientQAT, arXiv 2407.11062). Nothing is to be
                                                  done before: they are parameters of a packed layer, rounded in the forward to their stored type
    adapt(model, Lora(8, place="beside"))         fixed codes and an adapter beside them, or after dequantization (QLoRA, arXiv 2305.14314)
    unpack(model)                                 the inverse of `pack`: masters come, which are the dequantized values; codes are found anew from
                                                  them in every forward, on the grid and grain that the model has, with steps that start as stored

After `unpack` the first forward is that of the packed model, bit for bit; each layer is compared, and one that would differ is refused by name. What
`pack` then gives has the same values as what came in; codes too, except below steps that are zero (core/further.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core import further as begun
from ..core.error import QuantError
from ..layers.adapter import AdapterSpec
from ..layers.packed import Packed, PackedLinear
from ..layers.quantized import Quantized
from . import artefact, hub, mixture
from .quantized import LAYERS

PLACES = ("after", "beside")


def adapt(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Put a fresh adapter into every packed linear layer, in place; train it with `train="*.adapter.*"`.

    Raises:
        QuantError: a place that needs masters, a model without packed layers, or with adapters already.
    """
    layers = {name: layer for name, layer in _packed(model).items() if isinstance(layer, PackedLinear)}
    place = getattr(spec, "place", None)
    if place is not None and place not in PLACES:
        raise QuantError(f"an adapter {place!r} stands before the quantizer, and packed codes have none; take {' or '.join(map(repr, PLACES))}, or "
                         "unpack(model) first")
    if taken := [name for name, layer in layers.items() if layer.adapter is not None]:
        raise QuantError(f"{taken[0]} has an adapter already")
    for layer in layers.values():
        layer.adapter = spec.build(torch.empty(layer.store.shape, device=layer.store.codes.device)).train(layer.training)
        layer.slots = layer.slots.but(adapter=spec)
    hub.adopt(model, hub.config_of(model, artefact.packed(model), hub.rules_of(model)))
    return model


def unpack(model: nn.Module, keep: str = "each") -> nn.Module:
    """Put its trainable form in the place of every packed layer, and return the model. Layers that share codes share one master. keep: see
    layers/quantized.py.

    Raises:
        QuantError: a model without packed layers, or not of transformers; a layer with a transform, an adapter or a norm; steps that do not train.
        The model is then as it was.
    """
    layers, fresh = _packed(model), _skeleton(model)
    mixture.open_named(fresh, layers)
    made: dict[int, Quantized] = {}
    out: dict[str, Any] = {}
    for name, layer in layers.items():
        if id(layer) in made:
            out[name] = made[id(layer)]
            continue
        twin = made.get(id(layer.store))
        made[id(layer)] = out[name] = _trainable(name, layer, fresh.get_submodule(name), twin, keep)
        made.setdefault(id(layer.store), out[name])
    artefact.put(model, out)
    for name, part in fresh.named_modules():                      # what `hub.untie` took out
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            if hasattr(part, attribute):
                setattr(model.get_submodule(name), attribute, getattr(part, attribute))
    hub.adopt(model, hub.in_training(model))
    return model


def _packed(model: nn.Module) -> dict[str, Any]:
    layers = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, Packed)}
    if not layers:
        raise QuantError(f"this {type(model).__name__} has no packed layer; it comes from pack(model), load_packed(path) or foreign.load(path)")
    return layers


def _skeleton(model: Any) -> nn.Module:
    """The same class in full precision, without memory: what stood in the place of each packed layer."""
    if not hasattr(model, "config"):
        raise QuantError(f"a {type(model).__name__} does not say what stood in the place of its packed layers; only models of transformers do")
    config = type(model.config).from_dict({key: value for key, value in model.config.to_dict().items() if key != "quantization_config"})
    with torch.device("meta"):
        return type(model)(config)


@torch.no_grad()
def _trainable(name: str, layer: Any, module: nn.Module, twin: Any, keep: str) -> Any:
    kind = next((each for each in LAYERS if isinstance(module, each.replaces)), None)
    if kind is None:
        raise QuantError(f"{name} stands for a {type(module).__name__}, which has no trainable form")
    if extra := [part for part in ("transform", "adapter", "norm") if getattr(layer, part) is not None]:
        raise QuantError(f"{name} has {' and '.join(extra)}, whose master is not in the file; train the steps alone, or start from the model in full "
                         "precision")
    q = layer.qtensor()
    if getattr(q, "grid", None) is None:
        raise QuantError(f"{name} is a {type(q).__name__}, made of several parts: which of them its master would train is the paper's to say. Train "
                         "its steps alone, or start from the model in full precision")
    w = q.dequantize()
    module.weight = nn.Parameter(torch.empty_like(w).T if _lies(module, w) else torch.empty_like(w))
    if getattr(module, "bias", None) is not None:
        module.bias = layer.bias
    new: Any = kind.of(module, layer.slots.but(weight=None, input=None, output=None, keep=keep))
    new.weight.data = new.unmatrix(w).contiguous()
    if twin is not None:
        new.weight = twin.weight
    quant = begun.of(q)
    new.weight_quantizer = quant.build().start(q).to(w.device) if twin is None else twin.weight_quantizer
    new.input_quantizer, new.output_quantizer = layer.input_quantizer, layer.output_quantizer
    new.slots = layer.slots.but(weight=quant, keep=keep)
    if not torch.equal(new.hard(), new.unmatrix(w)):
        raise QuantError(f"{name}: the quantizer of its own values would move {int((new.hard() != new.unmatrix(w)).sum())} of {w.numel()} of them "
                         f"({q.grid}, {q.grain}); train the steps alone")
    return new


def _lies(module: nn.Module, w: torch.Tensor) -> bool:
    """Whether a module lays its weight (in, out)."""
    weight: Any = module.weight
    return tuple(weight.shape) != tuple(w.shape)
