"""A trained model as an artefact: packed in place, saved, loaded, or handed to an exporter as a Checkpoint.

    pack(model)                     masters go, codes come; the model computes the same values, bit for bit
    save(model, "out")              model.safetensors, config.json with quantization_config, tokenizer; a trainable model may be given as it is
    load_packed("out")              a transformers model, by the class that config.json names; `AutoModel...from_pretrained("out")` does the same
    load_into(model, "out")         any nn.Module: build it in full precision, then fill it
    checkpoint(model, "tok")        names of Hugging Face -> QTensor or Tensor, for qatlas.export

A directory appears whole or not at all: it is written beside its place and renamed. Files are compared with the model before the model is touched.
Nothing is pickled, nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.error import CheckpointError, QuantError, foreign
from ..core.qtensor import Masked, QTensor
from ..export.checkpoint import TOKENIZER, Checkpoint, appearing
from ..layers.experts import PackedStack, QStack
from ..layers.packed import Packed
from . import artefact, fold, hub, inner, mixture


def pack(model: nn.Module) -> nn.Module:
    """Put its packed form in the place of every quantized layer, and return the model in eval mode. Layers with one weight share one Store.

    Raises:
        QuantError: a model without quantized layers, a quantizer that cannot give codes; the model is then as it was.

    >>> from qatlas.core.scheme import weight; from qatlas.layers.linear import QLinear; from qatlas.layers.quantized import Slots
    >>> model = nn.Sequential(QLinear.of(nn.Linear(64, 8), Slots(weight=weight(4))), nn.ReLU())
    >>> x = torch.ones(1, 64); before = model(x)
    >>> torch.equal(pack(model)(x), before), type(model[0]).__name__
    (True, 'PackedLinear')
    """
    layers = artefact.packed(_quantized(model))
    artefact.put(model, layers)
    hub.untie(model, layers)
    hub.adopt(model, hub.config_of(model, layers, hub.rules_of(model)))
    return model.eval()


def checkpoint(model: nn.Module, tokenizer: Path | str | None = None, name: str = "qatlas") -> Checkpoint:
    """The model as an `export.Checkpoint`: its config, parameter names -> QTensor ((out, in) layout, also for GPT-2's Conv1D) or Tensor.

    A tied head is left out, as in Hugging Face's own files. The model stays as it is, packed or not.

    Raises:
        QuantError: a layer whose codes are not those of its weight alone: a transform that is not folded, an adapter that is not merged, a norm in
        front; a stack of experts.
    """
    layers = artefact.packed(_quantized(model))
    inside = inner.expected(inner.installed(model))
    full = {n: t for n, t in artefact.tensors(model, {n: y for n, y in layers.items() if isinstance(y, Packed)}).items()
            if not _inside(n, layers) and n not in inside}
    tensors: dict[str, Tensor | QTensor] = {}
    seen: set[int] = set()
    if stacks := [at for at, layer in layers.items() if isinstance(layer, PackedStack | QStack)]:
        raise QuantError(f"{len(stacks)} layers are stacks of experts, for instance {stacks[0]}, which no export of ours writes; the packed "
                         "directory holds them")
    if normed := [at for at, layer in layers.items() if layer.norm is not None]:
        raise QuantError(f"{len(normed)} layers have a norm in front of them, for instance {normed[0]}: no exported weight contains it. The packed "
                         "directory does; to export, train without")
    for at, layer in layers.items():
        if not isinstance(layer, Packed) or id(layer.store) in seen:
            continue
        what = "transform" if layer.transform is not None else "adapter" if layer.adapter is not None and not _silent(layer) else None
        if what:
            raise QuantError(f"{at} has a {what}, which no exported weight contains; fold or merge it first")
        seen.add(id(layer.store))
        tensors[f"{at}.weight"] = _detached(layer.qtensor())
    for at, layer in layers.items():
        if isinstance(layer, Packed) and layer.bias is not None:
            full[f"{at}.bias"] = layer.bias.detach().clone()
        elif not isinstance(layer, Packed):
            full |= {f"{at}.{n}": t.detach().clone() for n, t in layer.named_parameters(recurse=False)}
    order = {n: i for i, n in enumerate(n for at, _ in model.named_modules() for n in (f"{at}.weight", f"{at}.bias"))}
    tensors |= full
    config = _config(model)
    config.pop("quantization_config", None)
    return Checkpoint(config, dict(sorted(tensors.items(), key=lambda item: order.get(item[0], len(order)))),
                      None if tokenizer is None else Path(tokenizer), name,
                      {at: layer.input_quantizer.quant for at, layer in layers.items() if layer.input_quantizer is not None},
                      (*(f"{at}:output" for at, layer in layers.items() if layer.output_quantizer is not None), *inner.installed(model)))


def save(model: nn.Module, path: Path | str, tokenizer: Any = None, rules: Any = None) -> Path:
    """Write the packed model into a new directory.

    tokenizer: an object with `save_pretrained`, or a directory whose tokenizer files are copied.
    rules: kept in config.json; by default those that `quantize` left on the model.

    Raises:
        CheckpointError: a path that is taken, a tokenizer directory without a tokenizer.
        QuantError: a model without quantized layers.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory; give another path, or remove it first")
    layers = artefact.packed(_quantized(model))
    config = hub.config_of(model, layers, hub.rules_of(model) if rules is None else [hub.plain(rule) for rule in rules])
    with appearing(target) as aside:
        aside.mkdir()
        save_file(artefact.tensors(model, layers), aside / "model.safetensors", metadata={"format": "pt"})
        _save_config(model, config, aside)
        _save_tokenizer(tokenizer, aside)
    return target


def load_packed(path: Path | str, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The transformers model that was saved in a directory, in eval mode. dtype: of what is not quantized; "auto" is what it was saved in.

    Raises:
        CheckpointError: no such directory, another library's model, another version, truncated or mismatched files, a class that transformers lacks.
    """
    import transformers

    config = read_config(path)
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        said = config.get("qatlas")
        found = name or (said.get("class") if isinstance(said, dict) else None) or "a model"
        raise CheckpointError(f"{path} holds {found}, which transformers cannot build; "
                              "build it in full precision and call load_into(model, path)")
    _files(path)
    with foreign(f"{path} cannot be loaded", CheckpointError):
        return cls.from_pretrained(str(path), dtype=dtype, local_files_only=True, use_safetensors=True)


def load_into(model: nn.Module, path: Path | str) -> nn.Module:
    """Turn a full-precision model of the same architecture into the packed model of a directory, in place; returned in eval mode.

    Raises:
        CheckpointError: as `load_packed`; the model is then as it was.
    """
    config = hub.QatlasConfig.from_dict(read_config(path)["quantization_config"])
    if config.form != "packed":
        raise CheckpointError(f"{path} holds a model in training (masters and scales); from_pretrained or qatlas.model.load.load builds it. "
                              "load_into fills a model with packed layers: save(model, path) writes them")
    files = _files(path)
    undo, close = fold.blank(model, config.folded), mixture.open_named(model, config.layers)
    try:
        layers = artefact.rebuild(model, config.layers)
        inside = inner.blank(model, config.signals)
        want = artefact.expected(model, layers) | inner.expected(inside)
        artefact.check(want, artefact.header(files), path)
    except CheckpointError:
        undo()
        close()
        raise
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shared = {name: tensor for name, tensor in state.items() if not _inside(name, layers)}
    for name, layer in layers.items():
        mine = {key.removeprefix(f"{name}."): value.to(device) for key, value in state.items() if key.startswith(f"{name}.")}
        layer.load_state_dict(mine, strict=False, assign=True)    # `check` has seen that nothing is missing; a tied Store is filled by its first
    model.eval()                                                  # scales stay as they lie in the file
    artefact.put(model, layers)
    inner.put(model, inside)
    model.load_state_dict(shared, strict=False)
    hub.untie(model, layers)
    hub.adopt(model, config)
    return model


def read_config(path: Path | str) -> dict[str, Any]:
    """config.json of a packed directory, method and version checked.

    Raises:
        CheckpointError: no such file, no JSON, no quantization_config of ours.
    """
    file = Path(path) / "config.json"
    try:
        config = artefact.read_json(file)
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in Path(path).iterdir())) or "nothing" if Path(path).is_dir() else "no such directory"
        raise CheckpointError(f"{path} has no config.json (found: {found}); give a directory that qatlas.save has written") from None
    ours = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise CheckpointError(f"{path} holds a model in full precision (config.json has no quantization_config); use load(path)")
    with foreign(f"{file}: its quantization_config cannot be read", CheckpointError):
        form = hub.QatlasConfig.from_dict(ours).form
    if form == "asked":
        raise CheckpointError(f"{path} has rules and no layers: it would load without a single quantized tensor. Save it again")
    return config


def _files(path: Path | str) -> list[Path]:
    files = sorted(Path(path).glob("model*.safetensors"))
    if not files:
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in Path(path).glob(kind))
        raise CheckpointError(f"{path} has no model.safetensors" + (f", only {', '.join(pickles)}: pickle files are never opened; "
                              "convert them to safetensors where they were made" if pickles else "; the copy is not complete"))
    artefact.within(path)
    artefact.header(files)
    return files


def _quantized(model: nn.Module) -> nn.Module:
    if not artefact.holds(model):
        raise QuantError(f"this {type(model).__name__} has no quantized layer; quantize(model, rules) comes first")
    return model


def _inside(name: str, layers: Any) -> bool:
    return any(name.startswith(f"{at}.") for at in layers)


def _silent(layer: Packed) -> bool:
    """An adapter that is already in the codes."""
    return getattr(getattr(layer.adapter, "spec", None), "place", None) in ("inside", "shift")


def _detached(q: Any) -> Any:
    if isinstance(q, Masked):
        return Masked(q.mask, _detached(q.one), _detached(q.other))
    scale = _detached(q.scale) if isinstance(q.scale, QTensor) else q.scale.detach().clone()
    offset = _detached(q.offset) if isinstance(q.offset, QTensor) else q.offset
    return QTensor(q.codes, scale, q.zero, offset, q.grid, q.grain, q.scale_dtype)


def _config(model: Any) -> dict[str, Any]:
    found = model.config.to_dict() if hasattr(model, "config") and hasattr(model.config, "to_dict") else {}
    return found | {"architectures": found.get("architectures") or [type(model).__name__]} if found else {}


def _save_config(model: Any, config: hub.QatlasConfig, folder: Path) -> None:
    if not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        cls = f"{type(model).__module__}.{type(model).__qualname__}"
        text = json.dumps({"qatlas": {"class": cls}, "quantization_config": config.to_dict()}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        return
    own = copy.deepcopy(model.config)
    own.quantization_config, own.architectures, own.dtype = config, [type(model).__name__], config.dtype
    own.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    found = [Path(tokenizer) / name for name in TOKENIZER if (Path(tokenizer) / name).is_file()]
    if not found:
        raise CheckpointError(f"{tokenizer} has no tokenizer files (none of {', '.join(TOKENIZER[:4])}, ...)")
    for file in found:
        shutil.copyfile(file, folder / file.name)
