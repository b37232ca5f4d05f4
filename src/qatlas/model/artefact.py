"""What a packed model is on disk: names, tensors, and the JSON that says all that tensors do not.

    model.safetensors     each parameter and buffer under its module's name; a packed layer has `NAME.store.codes` (bytes, dense), `NAME.store.scale`
                          (in the type in which the Quant declares it stored, where that loses nothing, else fp32), `.zero` or `.offset`
    quantization_config   {"quant_method": "qatlas", "version": 1, "dtype": ..., "layers": {NAME: meta}, "rules": [...]}

A layer's meta is `Packed.to_meta()`; with {"same": OTHER} two names are one module, and with "tied": OTHER two layers share one Store (an embedding
and its head). A layer whose weight is in full precision and whose input is not has {"layer": "QLinear", "slots", "quants"} and its weight as it was.

Reading is in three steps, none of which changes a model: `rebuild` makes empty layers from the metas, on the meta device, `expected` lists what the
model would hold with them, `check` compares that with the headers of the files. Only then does anyone write into a model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.error import SAID, CheckpointError, QuantError, nearest
from ..core.noun import from_json
from ..layers.packed import Packed, blank_quantizer, steps_of
from ..layers.quantized import Layer, Quantized
from ..layers.store import Store

METHOD, VERSION = "qatlas", 1
KINDS = {"F16": torch.float16, "BF16": torch.bfloat16}           # of scales
SHOWN = 4                                                         # names of one kind that an error lists


def packed(model: nn.Module) -> dict[str, Layer]:
    """Name -> what the layer is when packed, for every quantized layer; the model stays as it is. Layers that share one weight and whose codes are
    equal share one Store; a layer that quantizes only its input or output is itself."""
    forms: dict[int, Layer] = {}
    stores: dict[int, list[Store]] = {}
    out: dict[str, Layer] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, Layer):
            continue
        if id(layer) not in forms:
            forms[id(layer)] = _form(layer, name, stores)
        out[name] = forms[id(layer)]
    return out


def _form(layer: Any, name: str, stores: dict[int, list[Store]]) -> Layer:
    if not isinstance(layer, Quantized) or layer.weight_quantizer is None:
        return layer
    try:
        form: Any = layer.pack()
    except QuantError as error:
        raise QuantError(f"{name}: {error}") from None
    form.to(layer.weight.device)
    known = stores.setdefault(id(layer.weight), [])
    for store in known:
        if store.to_meta() == form.store.to_meta() and all(map(torch.equal, *zip(*_pairs(store, form.store), strict=True))):
            form.store = store
            return form
    known.append(form.store)
    return form


def _pairs(a: nn.Module, b: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    other = b.state_dict()
    return ((tensor, other[name]) for name, tensor in a.state_dict().items())


def metas(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> the JSON of each layer of `packed`."""
    names: dict[int, str] = {}
    out: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        if id(layer) in names:
            out[name] = {"same": names[id(layer)]}
            continue
        names[id(layer)] = name
        if not isinstance(layer, Packed):
            quants = {slot: q.quant.to_json() for slot in ("input", "output") if (q := getattr(layer, f"{slot}_quantizer")) is not None}
            out[name] = {"layer": type(layer).__name__, "slots": layer.slots.to_json(), "quants": quants, **steps_of(layer)}
            continue
        first = names.setdefault(id(layer.store), name)
        out[name] = layer.to_meta() | ({"tied": first} if first != name else {})
    return out


def tensors(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """What goes into the file: each tensor once, under its first name, on CPU, scales in their stored type."""
    stored = {f"{name}.{path}.scale": part.scale_dtype
              for name, layer in layers.items() for path, part in layer.named_modules() if isinstance(part, Store)}
    out = {}
    for name, tensor in _state(model, layers).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors only")
        tensor = tensor.detach().cpu().contiguous()
        out[name] = narrow(tensor, stored[name]) if name in stored else tensor.clone()
    return out


def narrow(scale: Tensor, dtype: str) -> Tensor:
    """The scale in its stored type where that loses nothing, else as it is.

    >>> narrow(torch.tensor([0.5]), "float16").dtype, narrow(torch.tensor([0.1]), "float16").dtype
    (torch.float16, torch.float32)
    """
    small = scale.to(getattr(torch, dtype))
    return small if torch.equal(small.to(scale.dtype), scale) else scale.clone()


def expected(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that a file for `model` with these layers must hold."""
    return {name: tuple(tensor.shape) for name, tensor in _state(model, layers).items()}


def _state(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The state of the model as if the layers stood in it; a tensor with two names has the first."""
    seen, out = set(), {}
    mine = {name: layer.state_dict(prefix=f"{name}.", keep_vars=True) for name, layer in layers.items()}
    shown: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        home = next((part for part in _parents(name) if part in layers), None)
        if home is None:
            group = {name: tensor}
        elif home in shown:
            continue
        else:
            shown.add(home)
            group = mine[home]
        for key, value in group.items():
            if id(value) not in seen:
                seen.add(id(value))
                out[key] = value
    return out


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def rebuild(model: nn.Module, found: Mapping[str, dict[str, Any]]) -> dict[str, Layer]:
    """Name -> an empty layer (tensors on the meta device) for each meta; the model stays as it is.

    Raises:
        CheckpointError: a name that the model lacks, another shape than the model's, a meta that makes no layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    out: dict[str, Layer] = {}
    for name, meta in sorted(found.items(), key=lambda item: ("tied" in item[1]) + 2 * ("same" in item[1])):      # JSON may have been sorted by name
        if name not in modules:
            raise CheckpointError(f"the file has a quantized layer {name!r}, which {type(model).__name__} lacks; nearest: "
                                  f"{', '.join(nearest(name, modules)) or 'none'}. The file belongs to another model or another version of it")
        try:
            out[name] = out[meta["same"]] if "same" in meta else _empty(modules[name], meta)
            if "tied" in meta:
                out[name].store = out[meta["tied"]].store                # type: ignore[assignment]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, QuantError) as error:
            raise CheckpointError(f"the description of layer {name!r} cannot be read ({type(error).__name__}: {error}); "
                                  "config.json was edited, or written by another version of qatlas") from None
    return out


def _empty(module: nn.Module, meta: dict[str, Any]) -> Any:
    with torch.device("meta"), _default(torch.float32):           # whatever type the model is loaded in: scales are fp32
        if "tensor" not in meta:
            return _half(module, meta)
        kind = {sub.__name__: sub for sub in Packed.__subclasses__()}[meta["layer"]]
        if set(meta["conf"]) != set(kind.conf):
            raise ValueError(f"conf has {', '.join(meta['conf'])}, a {meta['layer']} takes {', '.join(kind.conf)}")
        layer = kind.from_meta(meta)
    weight = getattr(module, "weight", None)
    if weight is not None and sorted(weight.shape) != sorted(layer.store.shape):
        raise ValueError(f"shape {tuple(layer.store.shape)} in the file, {tuple(weight.shape)} in the model")
    return layer


def _half(module: nn.Module, meta: dict[str, Any]) -> Any:
    """A layer that quantizes its input or output only: it shares the module's parameters."""
    kinds = {sub.__name__: sub for sub in Quantized.__subclasses__()}
    layer = kinds[meta["layer"]].of(module, from_json(meta["slots"]))
    for slot, quant in meta["quants"].items():
        with torch.device("cpu"):
            setattr(layer, f"{slot}_quantizer", blank_quantizer(quant, slot, meta))
    return layer


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def await_steps(model: nn.Module, layers: Mapping[str, Layer], have: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Let the scales of empty layers wait in the narrow types in which the files hold them. The first parameter of a model, by which transformers
    tells the type of the whole, stays as it is."""
    firsts = {id(next((p for p in part.parameters() if p.is_floating_point()), None)) for part in model.modules() if hasattr(part, "config")}
    for name, layer in layers.items():
        for path, part in layer.named_modules():
            kind = KINDS.get(have.get(f"{name}.{path}.scale", ((), ""))[1])
            if kind is not None and isinstance(part, Store) and isinstance(part.scale, nn.Parameter) and id(part.scale) not in firsts:
                part.scale.data = part.scale.data.to(kind)


def put(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Set the layers into the model, in the mode of what they replace."""
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(model.training))


def header(files: Iterable[Path | str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, type) of safetensors files, without reading the data.

    Raises:
        CheckpointError: a file that is truncated, or none of safetensors; a tensor that two files hold.
    """
    out = {}
    for file in files:
        if not Path(file).is_file():                              # neither is a pipe, at which a reader would wait
            raise CheckpointError(f"{file} is no file; the copy is not complete")
        if Path(file).suffix != ".safetensors":
            raise CheckpointError(f"{file} is a pickle file, which is never opened; convert it to safetensors where it was made "
                                  "(model.save_pretrained writes them)")
        try:
            with safe_open(str(file), "pt") as data:
                for name in list(data.keys()):
                    if name in out:
                        raise CheckpointError(f"{file} holds {name}, and so does a file before it; they are not of one save")
                    part = data.get_slice(name)
                    out[name] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({str(error)[:SAID]}); copy or save it again") from None
    return out


def within(folder: Path | str) -> None:
    """Raises CheckpointError: the index of a sharded model names what is no file of this directory. (A link may lead elsewhere: those of the Hub's
    cache do, and whoever unpacks a directory sees them.)"""
    for index in sorted(Path(folder).glob("*.safetensors.index.json")):
        said = read_json(index)
        names = said.get("weight_map") if isinstance(said, dict) else None
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index} has no weight_map; copy or save it again")
        for name in names.values():
            if not isinstance(name, str) or name != Path(name).name or not (index.parent / name).is_file():
                raise CheckpointError(f"{index} sends readers to {str(name)[:80]!r}, which is no file of its directory; copy or save it again")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: a file that is none, or no JSON. FileNotFoundError: no file.
    """
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is no file; copy or save it again")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}); copy or save it again") from None


def check(want: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[tuple[int, ...], str]], where: Any, excused: Iterable[str] = ()) -> None:
    """Compare names, shapes and the type of the codes.

    Raises:
        CheckpointError: naming what is missing, superfluous, or of another shape.
    """
    wrong = [f"{name}: {have[name][0]} in the file, {shape} in the model" for name, shape in want.items()
             if name in have and tuple(have[name][0]) != tuple(shape)]
    wrong += [f"{name}: codes of type {have[name][1]}, not U8" for name in want
              if name in have and name.endswith("store.codes") and have[name][1] != "U8"]
    faults = {"missing": sorted(set(want) - set(have) - set(excused)), "superfluous": sorted(set(have) - set(want)), "of another shape": wrong}
    lines = [f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}" for kind, names in faults.items() if names]
    if lines:
        raise CheckpointError("\n".join([f"{where} does not hold this model ({len(have)} tensors in the file, {len(want)} in the model):", *lines,
                                         "  config.json and the weights must come from the same save; nothing was loaded"]))


def holds(model: nn.Module) -> bool:
    """Whether the model has a quantized layer, trainable or packed."""
    return any(isinstance(module, Layer) for module in model.modules())
