"""Loading through transformers: `AutoModel...from_pretrained(directory)` after `import qatlas`.

transformers asks a registered quantizer for help when config.json names its `quant_method`, or when the caller gives a `quantization_config`, which
has three forms:

    asked        QatlasConfig("w4-g32", target="gguf:q4_0") and a directory in full precision: the weights are loaded, then `quantize` sets its
                 layers, so every scale starts from the weights that are there
    trainable    what `save_pretrained` writes of a model in training, and a Trainer as its checkpoints: masters and scales (trainable.py)
    packed       codes (artefact.py)

The layers of a saved model are put into the empty model before any weight is read, and names and shapes are compared with the files' headers. Four
things need care:

    types    the loader casts a floating tensor to the type of the parameter that waits for it. Scales wait in fp32 whatever `dtype=` the user
             passes, so they arrive bit for bit, also from fp16 or fp8 files; biases and norms take the user's type. A model to be trained is loaded
             in fp32 as a whole, and a `dtype=` that says otherwise is answered by a warning.
    ties     transformers ties `lm_head.weight` to the embedding; packed layers have no `weight`. They share one Store, which only the first of
             them shows while the file is read. Trainable layers keep their weight and share their quantizer in the same way.
    names    the file holds the modules' own names, so the conversions from older checkpoints are switched off for models of ours.
    training the Trainer refuses quantized models without adapters, unless `is_qat_trainable`: a packed one is refused, one with masters is not.

The registration in this file is the only thing in qatlas that happens on import.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.error import CheckpointError, RuleError
from ..core.noun import Noun, from_json
from ..export import target as find_target
from ..layers.packed import Packed
from . import artefact, fold, inner, mixture, trainable
from .rules import Rule, of_scheme, quantize


@register_quantization_config(artefact.METHOD)
class QatlasConfig(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained` and of config.json.

    rules: a bit string such as "w2a8-g64", or a list of `Rule`s. target: the format for which the model is trained, such as "gguf:q4_0".
    The rest is written by `save_pretrained`: version, dtype (of what is not quantized), layers (name -> meta, of a packed model), trainable (the
    same, of one in training), full (names that stay in full precision), signals (address -> meta of a quantizer inside attention), folded (batch norm
    -> the layer that it was folded into).

    Raises:
        CheckpointError: another method or version, or fields that this version does not know. QuantError, RuleError: rules that are none.
        FormatError: an unknown target.

    >>> QatlasConfig("w4-g32", target="gguf:q4_0")
    QatlasConfig('w4-g32', target='gguf:q4_0')
    """

    def __init__(self, rules: str | Sequence[Any] = (), target: str | None = None, *, quant_method: str = artefact.METHOD,
                 version: int = artefact.VERSION, dtype: str = "float32", layers: Mapping[str, Any] | None = None,
                 trainable: Mapping[str, Any] | None = None, full: Sequence[str] = (), signals: Mapping[str, Any] | None = None,
                 folded: Mapping[str, str] | None = None, **rest: Any) -> None:
        if quant_method != artefact.METHOD:
            raise CheckpointError(f"quant_method is {quant_method!r}, not 'qatlas': another library quantized this model; load it with that one")
        if version != artefact.VERSION or rest:
            found = f"version {version}" + (f" with {', '.join(sorted(rest))}" if rest else "")
            raise CheckpointError(f"this checkpoint is of {found}; this qatlas reads version {artefact.VERSION}. Install the qatlas that wrote it")
        self.quant_method: Any = quant_method
        self.version, self.dtype, self.target = version, dtype, target
        self.rules = rules if isinstance(rules, str) else [plain(rule) for rule in rules]
        self.layers, self.trainable, self.signals, self.full = dict(layers or {}), dict(trainable or {}), dict(signals or {}), list(full)
        self.folded = dict(folded or {})
        if not (self.rules or self.layers or self.trainable):
            raise CheckpointError("quantization_config has no layers and no rules: the model would load without a single quantized tensor. "
                                  'Save it again; to quantize one, write QatlasConfig("w4-g32")')
        if self.form == "asked":
            self.asked()
            find_target(target) if target is not None else None

    @property
    def form(self) -> str:
        """asked, trainable or packed."""
        return "packed" if self.layers else "trainable" if self.trainable else "asked"

    def asked(self) -> list[Rule]:
        """The rules.

        Raises:
            RuleError, QuantError: what is neither a bit string nor a list of rules.
        """
        found = of_scheme(self.rules) if isinstance(self.rules, str) else [from_json(rule) for rule in self.rules]
        wrong = [rule for rule in found if not isinstance(rule, Rule)]
        if wrong:
            raise RuleError(f'{wrong[0]!r} is no Rule; rules are a bit string such as "w4-g32", or a list such as [Rule("*", weight=weight(4))]')
        return found

    def to_dict(self) -> dict[str, Any]:
        quiet = ("signals", "trainable", "full", "target", "layers", "folded")
        return {name: value for name, value in super().to_dict().items() if name not in quiet or value}

    def __repr__(self) -> str:
        said = f"{len(self.layers or self.trainable)} {self.form} layers" if self.form != "asked" else repr(self.rules)
        return f"QatlasConfig({said}{'' if self.target is None else f', target={self.target!r}'})"


@register_quantizer(artefact.METHOD)
class Loader(HfQuantizer):
    """The quantizer that transformers calls; see the head of this file."""

    quantization_config: QatlasConfig

    def __init__(self, quantization_config: QatlasConfig, **kwargs: Any) -> None:
        saved, form = kwargs.get("pre_quantized", True), quantization_config.form
        if not saved and form != "asked":
            raise CheckpointError(f"this quantization_config describes the layers of a {form} model, and the directory holds one in full precision; "
                                  'to quantize it, write quantization_config=QatlasConfig("w4-g32")')
        if saved and form == "asked":
            raise CheckpointError("quantization_config has rules and no layers: the model would load without a single quantized tensor. "
                                  "Save it again")
        super().__init__(quantization_config, **kwargs)
        self.tied: list[tuple[nn.Module, nn.Module]] = []
        self.shared = "store" if form == "packed" else "weight_quantizer"

    def update_attn_implementation(self, config: Any) -> Any:
        if self.pre_quantized:
            config.dtype = self.quantization_config.dtype         # for dtype="auto": model.dtype would see a scale and say fp32
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.quantization_config.form == "packed" or dtype in (torch.float32, torch.float64):
            return dtype
        warnings.warn(f"loaded in float32, not in {str(dtype).removeprefix('torch.')}: a master of 16 bits does not move at a learning rate of 1e-5. "
                      "Mixed precision is bf16=True of the TrainingArguments; dtype=torch.float32 silences this", stacklevel=2)
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        config = self.quantization_config
        if config.form == "asked":
            return
        packed, said = config.form == "packed", config.layers or config.trainable
        whole = type(model).__name__ in (model.config.architectures or [type(model).__name__])
        fold.blank(model, config.folded if whole else _renamed(model, config.folded))
        said = said if whole else _renamed(model, said)
        mixture.open_named(model, said)
        layers = (artefact if packed else trainable).rebuild(model, said)
        inner.put(model, inner.blank(model, config.signals if whole else _renamed(model, config.signals)))
        if checkpoint_files and whole:
            want = artefact.expected(model, layers)
            have = artefact.header(checkpoint_files)
            artefact.check(want, have, checkpoint_files[0], _excused(model, have))
        elif checkpoint_files:
            have = artefact.header(checkpoint_files)
        firsts: dict[int, nn.Module] = {}
        for layer in dict.fromkeys(layers.values()):
            if packed:
                _serve(layer, model.config.dtype or torch.float32)
            part = layer._modules.get(self.shared)
            first = layer if part is None else firsts.setdefault(id(part), layer)
            if first is not layer:
                layer._modules[self.shared] = None
                self.tied.append((layer, first))
        artefact.put(model, layers)
        if packed:
            untie(model, layers)
            artefact.await_steps(model, layers, have if checkpoint_files else {})

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for layer, first in self.tied:
            setattr(layer, self.shared, getattr(first, self.shared))
        self.tied = []
        config = self.quantization_config
        if config.form == "asked":
            quantize(model, config.asked(), target=config.target).eval()
            self.quantization_config = model.config.quantization_config = in_training(model, config.target)
        elif config.form == "trainable":
            model.qatlas_rules, model.qatlas_full = tuple(from_json(rule) for rule in config.rules), set(config.full)
        model._weight_conversions = []
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        before = self.quantization_config
        if trainable.holds(model):
            self.quantization_config = model.config.quantization_config = in_training(model, before.target)
            return trainable.tensors(model), {}
        layers = artefact.packed(model)
        self.quantization_config = model.config.quantization_config = config_of(model, layers, before.rules)
        return artefact.tensors(model, layers), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True                                               # of a packed model scales, norms and biases are parameters

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.form != "packed"


def plain(rule: Any) -> Any:
    """A rule as JSON."""
    return rule.to_json() if isinstance(rule, Noun) else rule


def rules_of(model: nn.Module) -> list[Any]:
    """The rules that were left on a model, as JSON."""
    before = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    rules: Any = getattr(model, "qatlas_rules", None) or getattr(before, "rules", ())
    return [plain(rule) for rule in rules]


def in_training(model: nn.Module, target: str | None = None) -> QatlasConfig:
    """The quantization_config of a model with trainable layers."""
    return QatlasConfig(rules_of(model), target, trainable=trainable.metas(model), full=sorted(getattr(model, "qatlas_full", ())),
                        signals=inner.metas(model), folded=fold.folded(model))


def _serve(layer: Any, dtype: torch.dtype) -> None:
    """Make the layer answer in `dtype`: its bias and a weight in full precision take it, codes and scales do not."""
    layer.answer = dtype
    for name in ("weight", "bias"):
        value = layer._parameters.get(name)
        if value is not None:
            setattr(layer, name, nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad))


def _renamed(model: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of layers under the names of another class over the same body (AutoModel of a causal model): of those that it has."""
    prefix, modules = f"{model.base_model_prefix}.", dict(model.named_modules())

    def here(name: str) -> str | None:
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n.partition(":")[0] in modules), None)

    out: dict[str, Any] = {}
    for name, meta in said.items():
        if (new := here(name)) is not None:
            out[new] = here(meta) if isinstance(meta, str) else {k: here(v) if k in ("same", "tied") else v for k, v in meta.items()}
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


def config_of(model: nn.Module, layers: Mapping[str, Any], rules: Any = ()) -> QatlasConfig:
    """The quantization_config of a model with these packed layers."""
    inside = {id(p) for part in (*layers.values(), *inner.installed(model).values()) for p in part.parameters()}
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside and p.dtype != torch.float64]
    answers = [layer.answer for layer in layers.values() if getattr(layer, "answer", None)]
    kind = (kinds or answers or [torch.float32])[0]
    return QatlasConfig(rules, dtype=str(kind).removeprefix("torch."), layers=artefact.metas(layers), signals=inner.metas(model),
                        folded=fold.folded(model))


def adopt(model: Any, config: QatlasConfig) -> None:
    """Make a transformers model that was quantized or packed here like one that was loaded so: its `save_pretrained` writes the same files."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    loader = Loader(copy.copy(config), pre_quantized=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = loader, True, artefact.METHOD
    model.config.quantization_config, model._weight_conversions = config, []
