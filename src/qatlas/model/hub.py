"""Loading through transformers: `AutoModel...from_pretrained(directory)` after `import qatlas`.

transformers asks a registered quantizer for help when config.json names its `quant_method`. Ours puts packed layers into the empty model, before
any weight is read, and compares names and shapes with the files' headers. Three things need care:

    types    the loader casts a floating tensor to the type of the parameter that waits for it. Scales wait in fp32 whatever `dtype=` the user
             passes, so they arrive bit for bit, also from fp16 or fp8 files; biases and norms take the user's type.
    ties     transformers ties `lm_head.weight` to the embedding; packed layers have no `weight`. They share one Store, which only the first of
             them shows while the file is read.
    names    the file holds the modules' own names, so the conversions from older checkpoints are switched off for packed models.

The registration at the end of this file is the only thing in qatlas that happens on import.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.error import CheckpointError
from ..layers.packed import Packed
from . import artefact, inner


@register_quantization_config(artefact.METHOD)
class Config(QuantizationConfigMixin):
    """`quantization_config` of config.json: version, dtype (of what is not quantized), layers (name -> meta), rules, and signals (address -> meta of
    a quantizer inside attention; left out where there is none).

    Raises:
        CheckpointError: another method or version, or fields that this version does not know.
    """

    def __init__(self, quant_method: str = artefact.METHOD, version: int = artefact.VERSION, dtype: str = "float32",
                 layers: Mapping[str, Any] | None = None, rules: Any = (), signals: Mapping[str, Any] | None = None, **rest: Any) -> None:
        if quant_method != artefact.METHOD:
            raise CheckpointError(f"quant_method is {quant_method!r}, not 'qatlas': another library quantized this model; load it with that one")
        if version != artefact.VERSION or rest:
            found = f"version {version}" + (f" with {', '.join(sorted(rest))}" if rest else "")
            raise CheckpointError(f"this checkpoint is of {found}; this qatlas reads version {artefact.VERSION}. Install the qatlas that wrote it")
        if not isinstance(layers, Mapping) or not layers:
            raise CheckpointError("quantization_config has no layers: the model would load without a single quantized tensor. Save it again")
        self.quant_method: Any = quant_method
        self.version, self.dtype = version, dtype
        self.layers, self.rules, self.signals = dict(layers), list(rules), dict(signals or {})

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "signals" or value}

    def __repr__(self) -> str:
        return f"qatlas.Config({len(self.layers)} layers, version {self.version})"


@register_quantizer(artefact.METHOD)
class Loader(HfQuantizer):
    """The quantizer that transformers calls; see the head of this file."""

    requires_calibration = True
    quantization_config: Config

    def __init__(self, quantization_config: Config, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise CheckpointError("a quantization_config of qatlas describes a packed model; to quantize one, load it in full precision and call "
                                  "qatlas.quantize(model, rules)")
        super().__init__(quantization_config, **kwargs)
        self.tied: list[tuple[nn.Module, nn.Module]] = []

    def update_attn_implementation(self, config: Any) -> Any:
        config.dtype = self.quantization_config.dtype             # for dtype="auto": model.dtype would see a scale and say fp32
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        whole = type(model).__name__ in (model.config.architectures or [type(model).__name__])
        layers = artefact.rebuild(model, self.quantization_config.layers if whole else _renamed(model, self.quantization_config.layers))
        inside = self.quantization_config.signals
        inner.put(model, inner.blank(model, inside if whole else _renamed(model, inside)))
        if checkpoint_files and whole:
            want = artefact.expected(model, layers)
            have = artefact.header(checkpoint_files)
            artefact.check(want, have, checkpoint_files[0], _excused(model, have))
        elif checkpoint_files:
            artefact.header(checkpoint_files)
        firsts: dict[int, nn.Module] = {}
        for layer in dict.fromkeys(layers.values()):
            _serve(layer, model.config.dtype or torch.float32)
            store = layer._modules.get("store")
            if store is None:
                continue
            first = firsts.setdefault(id(store), layer)
            if first is not layer:
                del layer._modules["store"]
                self.tied.append((layer, first))
        artefact.put(model, layers)
        untie(model, layers)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for layer, first in self.tied:
            layer.store = first.store
        self.tied = []
        model._weight_conversions = []
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        layers = artefact.packed(model)
        self.quantization_config = config_of(model, layers, self.quantization_config.rules)
        model.config.quantization_config = self.quantization_config
        return artefact.tensors(model, layers), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True                                               # scales, norms and biases are parameters


def _serve(layer: Any, dtype: torch.dtype) -> None:
    """Make the layer answer in `dtype`: its bias and a weight in full precision take it, codes and scales do not."""
    layer.answer = dtype
    for name in ("weight", "bias"):
        value = layer._parameters.get(name)
        if value is not None:
            setattr(layer, name, nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad))


def _renamed(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers under the names of another class over the same body (AutoModel of a causal model): those that it has."""
    prefix, modules = f"{model.base_model_prefix}.", dict(model.named_modules())
    names = {name: next((n for n in (name, name.removeprefix(prefix), prefix + name) if n.partition(":")[0] in modules), None) for name in layers}
    out = {}
    for name, meta in layers.items():
        if (new := names[name]) is not None:
            out[new] = {k: names[v] if k in ("same", "tied") else v for k, v in meta.items()}
    return out


def _excused(model: Any, have: Mapping[str, Any]) -> set[str]:
    """Names that a file may lack: what transformers ties to another that is there, and what the class never saves."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    out = {a for a, b in ties.items() if b in have} | {b for a, b in ties.items() if a in have}
    return out | set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def untie(model: Any, layers: Mapping[str, Any]) -> None:
    """Take out of transformers' list of tied weights those that are packed; their layers share a Store instead."""
    for part in model.modules():
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(part, attribute, None)
            if isinstance(ties, dict) and ties:
                here = {a: b for a, b in ties.items() if not any(_is_packed(part, name) for name in (a, b))}
                setattr(part, attribute, here)


def _is_packed(part: nn.Module, name: str) -> bool:
    try:
        return name.endswith(".weight") and isinstance(part.get_submodule(name.removesuffix(".weight")), Packed)
    except AttributeError:
        return False


def config_of(model: nn.Module, layers: Mapping[str, Any], rules: Any = ()) -> Config:
    """The quantization_config of a model with these packed layers."""
    inside = {id(p) for part in (*layers.values(), *inner.installed(model).values()) for p in part.parameters()}
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside and p.dtype != torch.float64]
    answers = [layer.answer for layer in layers.values() if getattr(layer, "answer", None)]
    kind = (kinds or answers or [torch.float32])[0]
    return Config(dtype=str(kind).removeprefix("torch."), layers=artefact.metas(layers), rules=rules,
                  signals=inner.metas(model))


def adopt(model: Any, config: Config) -> None:
    """Make a transformers model that was packed here like one that was loaded packed, so that its `save_pretrained` writes the same files."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    loader = Loader(copy.copy(config), pre_quantized=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = loader, True, artefact.METHOD
    model.config.quantization_config, model._weight_conversions = config, []
