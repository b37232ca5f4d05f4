"""A model that is still in training, as an artefact: masters, scales, and the JSON that says the rest.

    model.safetensors     each parameter and buffer under its module's name: `NAME.weight` is the fp32 master, `NAME.weight_quantizer.scale` its
                          steps, `NAME.input_quantizer.scale` a calibrated step; an adapter, a transform and a norm under theirs
    quantization_config   {"quant_method": "qatlas", "version": 1, "trainable": {NAME: meta}, "full": [...], "rules": [...]}

A layer's meta is its class, its Slots, and for each quantizer its Quant (calibration may have decided the signedness since) with the shapes of what
it holds. So a model is rebuilt from what it was, not from its rules: nothing is measured, fitted or calibrated a second time. Layers that share one
weight share one quantizer ("tied"), which the file holds once. `full` are the names that the rules keep in full precision, which coverage asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import CheckpointError, QatlasError, nearest
from ..core.noun import from_json
from ..layers.packed import Packed
from ..layers.quantized import Layer, Quantized, Slots
from ..layers.rows import Rows

SLOTS = ("weight", "input", "output")


def holds(model: nn.Module) -> bool:
    """Whether the model has quantized layers and all of them have their masters."""
    found = [module for module in model.modules() if isinstance(module, Layer)]
    return bool(found) and not any(isinstance(module, Packed) for module in found)


def metas(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> the JSON of each trainable layer."""
    firsts: dict[int, str] = {}
    out: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Quantized):
            continue
        parts = {slot: q for slot in SLOTS if (q := getattr(layer, f"{slot}_quantizer")) is not None}
        out[name] = {"layer": type(layer).__name__, "slots": layer.slots.to_json(), "quantizers": {}}
        if "weight" in parts and (first := firsts.setdefault(id(parts["weight"]), name)) != name:
            out[name]["tied"] = first
            del parts["weight"]
        for slot, quantizer in parts.items():
            quant = layer.slots.weight if isinstance(layer.slots.weight, Rows) and slot == "weight" else quantizer.quant
            out[name]["quantizers"][slot] = {"quant": quant.to_json(), "state": {key: list(t.shape) for key, t in quantizer.state_dict().items()}}
    return out


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model, each tensor once, under its first name."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.detach()
    return out


def rebuild(model: nn.Module, found: Mapping[str, dict[str, Any]]) -> dict[str, Layer]:
    """Name -> a layer around the model's own parameters, its quantizers to be filled, for each meta; the model stays as it is.

    Raises:
        CheckpointError: a name that the model lacks, a meta that makes no layer.
    """
    modules = dict(model.named_modules())
    out: dict[str, Layer] = {}
    for name, meta in sorted(found.items(), key=lambda item: "tied" in item[1]):  # JSON is sorted by name; the file holds the first of two
        if name not in modules:
            raise CheckpointError(f"the file has a quantized layer {name!r}, which {type(model).__name__} lacks; nearest: "
                                  f"{', '.join(nearest(name, modules)) or 'none'}. The file belongs to another model or another version of it")
        try:
            out[name] = _empty(modules[name], meta)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, QatlasError) as error:
            raise CheckpointError(f"the description of layer {name!r} cannot be read ({type(error).__name__}: {error}); "
                                  "config.json was edited, or written by another version of qatlas") from None
    for name, meta in found.items():
        if "tied" in meta:
            if meta["tied"] not in out:
                raise CheckpointError(f"layer {name!r} shares the quantizer of {meta['tied']!r}, which the file lacks; config.json was edited")
            out[name].weight_quantizer = out[meta["tied"]].weight_quantizer
    return out


def _empty(module: nn.Module, meta: dict[str, Any]) -> Any:
    kind = {sub.__name__: sub for sub in Quantized.__subclasses__()}[meta["layer"]]
    if not isinstance(module, kind.replaces):
        raise ValueError(f"a {meta['layer']} stands for a {kind.replaces.__name__}, the model has a {type(module).__name__} there")
    slots: Slots = from_json(meta["slots"])
    layer = kind.of(module, Slots(keep=slots.keep, norm=slots.norm))      # nothing that would look at values: the model may be on the meta device
    with torch.device("cpu"):
        for slot, said in meta["quantizers"].items():
            quant = from_json(said["quant"])
            quantizer = slots.frozen.build(quant) if slot == "weight" and slots.frozen is not None else quant.build()
            quantizer.load_state_dict({key: torch.ones(shape) for key, shape in said["state"].items()})
            setattr(layer, f"{slot}_quantizer", quantizer)
        if slots.transform is not None or slots.adapter is not None:
            like = torch.ones(tuple(layer.matrix().shape))
            layer.transform = slots.maps(like, like[0])
            layer.adapter = slots.adapter.build(like) if slots.adapter is not None else None
    if slots.frozen is not None:
        w = layer.matrix().detach()
        layer.hold(torch.empty(w.shape, dtype=slots.frozen.dtype(w.dtype), device=w.device))
    layer.slots = slots
    return layer
