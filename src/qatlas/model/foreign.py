"""Foreign: a model that others have quantized, as a start for further training.

    load("path")      the packed model: codes and steps of the file in packed layers, its input quantizers, the rest in fp32. It computes what the
                      file says. further.py trains it on: its steps, adapters, or all weights as masters
    whole("path")     the same weights in full precision, dequantized: what a paper's own rules start from. Codes, steps and input quantizers go

Each format is asked whether it holds the path (`export.holder`); what a tensor becomes is the format's knowledge, and which layer takes it is ours.
The model is the class that the config names, built without memory for weights. Every tensor must find its place and every place its tensor: nothing
is initialised at random, and nothing of the file is left out. Plain tensors are widened to fp32, as masters are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core import further as begun
from ..core.error import CheckpointError, FormatError, QuantError
from ..core.qtensor import QTensor
from ..export import holder, readable
from ..export.checkpoint import Signal
from ..export.shards import read_json
from ..layers.packed import Packed, PackedEmbedding, PackedLinear
from ..layers.quantized import Slots
from . import artefact, hub

KINDS: dict[type[nn.Module], type[Packed]] = {nn.Linear: PackedLinear, Conv1D: PackedLinear, nn.Embedding: PackedEmbedding}
SKIPPED = "rotary_emb.inv_freq"                                   # a buffer that old checkpoints carry; it follows from the config


def load(path: str | Path) -> nn.Module:
    """The packed model of a foreign artefact, in eval mode.

    Raises:
        FormatError: what the format cannot read, by name. CheckpointError: a path of no format, a model that transformers cannot build, tensors that
        are not its.
    """
    model, tensors, signals = _read(path)
    layers = _layers(path, model, {n: t for n, t in tensors.items() if isinstance(t, QTensor)}, signals)
    artefact.put(model, layers)
    _fill(path, model, {name: t for name, t in tensors.items() if isinstance(t, Tensor)}, layers)
    hub.untie(model, layers)
    full: Any = model
    full.qatlas_full = {name for name, module in model.named_modules() if type(module) in KINDS}
    hub.adopt(model, hub.config_of(model, layers))
    return model.eval()


def whole(path: str | Path) -> nn.Module:
    """The model of a foreign artefact in full precision, in eval mode: its weights dequantized, its inputs not quantized.

    Raises:
        FormatError, CheckpointError: see `load`.
    """
    model, tensors, _ = _read(path)
    _fill(path, model, {name: _oriented(model, name, t) for name, t in tensors.items()}, {})
    return model.eval()


def told(path: str | Path) -> str | None:
    """What is to be said when a paper starts from a path: a sentence for foreign artefacts, None for others."""
    form = holder(path)
    return None if form is None else (
        f"{path} is quantized ({form}): training starts in full precision from its dequantized weights; its codes, steps and input quantizers are "
        "not kept. To train those on: qatlas.model.foreign.load, qatlas.model.further")


def _read(path: str | Path) -> tuple[nn.Module, dict[str, QTensor | Tensor], dict[str, Signal]]:
    """The empty model, the tensors, and how inputs are quantized."""
    form = holder(path)
    if form is None:
        raise CheckpointError(f"{path} is of no format that training can start from; those are {', '.join(readable())}")
    module = readable()[form]
    config = module.config(path) if hasattr(module, "config") else read_json(Path(path) / "config.json")
    model = _empty(path, config)
    return model, module.qtensors(path), module.inputs(path) if hasattr(module, "inputs") else {}


def _empty(path: str | Path, config: dict[str, Any]) -> nn.Module:
    """The class that the config names: weights on the meta device, buffers with their values."""
    import transformers
    from accelerate import init_empty_weights

    kind, names = str(config.get("model_type")), config.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if cls is None or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{path} holds {names[0] if names else 'a model'} of type {kind!r}, which transformers cannot build")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(transformers.CONFIG_MAPPING[kind].from_dict(plain))
        model.config.dtype = torch.float32
        if (Path(path) / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:                                    # what a class raises for a config that it cannot use differs from class to class
        raise CheckpointError(f"{path}: {names[0]} cannot be built from the config: {str(error)[:300]}") from error
    return model


def _layers(path: str | Path, model: nn.Module, found: Mapping[str, QTensor], signals: Mapping[str, Signal]) -> dict[str, Any]:
    """Name -> the packed layer of each quantized weight; a tied layer that the file leaves out shares the codes of the other."""
    modules = dict(model.named_modules())
    out: dict[str, Any] = {}
    for name, q in found.items():
        at = name.removesuffix(".weight")
        out[at] = _layer(f"{path}: {name}", modules.get(at), q, signals.get(at))
    if lost := [at for at in signals if at not in out]:
        raise CheckpointError(f"{path}: the input of {lost[0]} is quantized and its weight is not, which no packed layer says")
    for one, other in _ties(model).items():
        for at, twin in ((one, other), (other, one)):
            if f"{twin}.weight" in found and f"{at}.weight" not in found:
                out[at] = _layer(f"{path}: {at}", modules.get(at), found[f"{twin}.weight"], None)
                out[at].store = out[twin].store
    order = {name: i for i, name in enumerate(modules)}
    return dict(sorted(out.items(), key=lambda item: order[item[0]]))


def _layer(where: str, module: nn.Module | None, q: QTensor, signal: Signal | None) -> Packed:
    kind = KINDS.get(type(module))  # type: ignore[arg-type]
    if module is None or kind is None:
        raise CheckpointError(f"{where} is quantized and belongs to a {type(module).__name__}; packed layers stand for "
                              f"{', '.join(each.__name__ for each in KINDS)}")
    weight: Any = module.weight
    shape = tuple(weight.shape)[::-1] if isinstance(module, Conv1D) else tuple(weight.shape)
    if tuple(q.shape) != shape:
        raise CheckpointError(f"{where} has shape {tuple(q.shape)} in the file and {shape} in the model")
    try:
        layer: Packed = kind.holding(q, module, Slots(weight=begun.of(q), input=None if signal is None else signal.quant))
    except QuantError as error:
        raise FormatError(f"{where}: {error}") from None
    if signal is not None and signal.scale is not None and layer.input_quantizer is not None:
        state = {"scale": signal.scale, "zero": signal.zero, "offset": signal.offset}
        layer.input_quantizer.load_state_dict({name: value for name, value in state.items() if value is not None})
    return layer


def _ties(model: Any) -> dict[str, str]:
    """Layer -> the layer whose weight it shares."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return {a.removesuffix(".weight"): b.removesuffix(".weight") for a, b in ties.items() if a.endswith(".weight") and b.endswith(".weight")}


def _fill(path: str | Path, model: Any, plain: Mapping[str, Tensor], layers: Mapping[str, Any]) -> None:
    """Plain tensors into their places; all of them, and all places."""
    plain = {name: t.float() if t.is_floating_point() else t for name, t in plain.items() if not name.endswith(SKIPPED)}
    inside = tuple(f"{at}.{part}." for at in layers for part in ("store", "input_quantizer"))
    want = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith(inside)}
    ties = {f"{a}.weight": f"{b}.weight" for a, b in _ties(model).items()}
    for a, b in ties.items():
        if a in plain and b in plain and not torch.equal(plain[a], plain[b]):
            raise CheckpointError(f"{path}: the config ties {a} to {b}, and the file holds two tensors that differ; say tie_word_embeddings=false")
    excused = {a for a, b in ties.items() if b in plain} | {b for a, b in ties.items() if a in plain}
    have = {name: (tuple(t.shape), str(t.dtype)) for name, t in plain.items()}
    artefact.check(want, have, path, excused)
    both = dict(plain)
    both |= {b: plain[a] for a, b in ties.items() if a in plain and b in want} | {a: plain[b] for a, b in ties.items() if b in plain and a in want}
    model.load_state_dict(both, strict=False, assign=True)
    if not any(at in layers for pair in _ties(model).items() for at in pair):
        model.tie_weights()
    if empty := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise CheckpointError(f"{path} gives no values for {', '.join(empty[:4])}")


def _oriented(model: nn.Module, name: str, t: QTensor | Tensor) -> Tensor:
    """A weight in full precision, as its module lays it."""
    if isinstance(t, Tensor):
        return t
    at = name.removesuffix(".weight")
    return t.dequantize().T.contiguous() if isinstance(dict(model.named_modules()).get(at), Conv1D) else t.dequantize()
