"""What others read in the directory: torchao, tensor by tensor, and transformers, which runs it. And what we read ourselves, trusting nothing.

Before torchao or transformers see a file it has been through `qtensors`: every attribute, type and shape is checked. config.json is checked too:
torchao looks up each `_type` there among all that its modules contain and calls it, so names other than those of the configs we know are refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from ...core.qtensor import QTensor
from .. import folder
from .fitting import NAME
from .layout import CLASS, DYNAMIC, PARTS, declared, load, parts

KNOWN = {"IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig", "FqnToConfig", "PerGroup", "PerAxis", "MappingType", "torch.dtype",
         "IntxPackingFormat", "IntxChooseQParamsAlgorithm"}


def lacks() -> str | None:
    """The sentence for a missing reader, or None."""
    return None if find_spec("torchao") else f"the package {NAME} is not installed: pip install 'qatlas[{NAME}]'"


def holds(path: str | Path) -> bool:
    """Whether a directory is of this format, by its config.json alone."""
    return (folder.said(path) or {}).get("quant_method") == NAME


def types(path: str | Path) -> dict[str, int]:
    """How many tensors of which type: int1 ... int8, full."""
    return dict(Counter(f"int{tensor.bits}" if isinstance(tensor, QTensor) else "full" for tensor in qtensors(path).values()))


def qtensors(path: str | Path) -> dict[str, QTensor | Tensor]:
    """Hugging Face name -> QTensor, whose `dequantize()` is torchao's in fp32 bit for bit, or the plain tensor as it lies there. Needs no torchao.

    Raises:
        FormatError: no such directory, a truncated, damaged or foreign one, only pickle files, a class of torchao's that is not Intx.
    """
    return _checked(path)[1]


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a directory under their Hugging Face names, fp32, as torchao's own `dequantize` gives them.

    Raises:
        FormatError: as `qtensors`, or the package is missing.
    """
    if lacks():
        raise FormatError(str(lacks()))
    found, checked = _checked(path)
    out = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in checked.items() if isinstance(tensor, Tensor)}
    header = {key: value for key, value in found.header.items() if key in checked or key == "tensor_names"}
    with _silent():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        try:
            made, _ = unflatten_tensor_state_dict(found.values, header)
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            raise FormatError(f"{path}: torchao cannot build its tensors: {error}. Write it anew") from error
    return out | {name: made[name].to(torch.float32).dequantize() for name, tensor in checked.items() if isinstance(tensor, QTensor)}


def model(path: str | Path) -> nn.Module | str:
    """The model that transformers loads from the directory in the type that config.json says, inputs quantized where the file says so; or a
    sentence on why it cannot.

    Raises:
        FormatError: a directory that transformers refuses.
    """
    if lacks():
        return str(lacks())
    config = folder.config(path, NAME)
    _check(config["quantization_config"].get("quant_type"), path)
    qtensors(path)
    with _silent():
        return folder.load(path, config, "auto")


def near(path: str | Path) -> str | None:
    """Why the model's logits come only close to the trained ones, or None where they are equal."""
    dynamic = any(DYNAMIC in line for line in folder.Tensors.of(path).header.values() if CLASS in line)
    return "torchao rounds an input to 8 bits before it adds the zero, so ties of activations fall either way" if dynamic else None


def _checked(path: str | Path) -> tuple[folder.Tensors, dict[str, QTensor | Tensor]]:
    """What lies in the file, and what it means."""
    folder.config(path, NAME)
    found = folder.Tensors.of(path)
    out: dict[str, QTensor | Tensor] = {}
    used: set[str] = set()
    for name, one in declared(found.header).items():
        layer, _, leaf = name.rpartition(".")
        if one.get("_type") != "Tensor":
            out[name] = load(name, one, parts(name, found.values))
            used |= {f"{layer}._{leaf}_{part}" for part in PARTS}
            continue
        if name not in found.values:
            raise FormatError(f"{path}: model.safetensors lacks {name}, which its header names; the copy is not complete")
        out[name] = found.values[name]
        used.add(name)
    if more := sorted(set(found.values) - used):
        raise FormatError(f"{path}: model.safetensors holds {more[0]}, of which its header says nothing; write it anew")
    return found, out


def _check(said: Any, path: str | Path) -> None:
    """Refuse every `_type` that we do not know, wherever it stands."""
    if isinstance(said, dict):
        if (kind := said.get("_type")) is not None and kind not in KNOWN:
            raise FormatError(f"{path}/config.json asks torchao for {kind!r}; of its configs we load {', '.join(sorted(KNOWN))}")
        for value in said.values():
            _check(value, path)
    elif isinstance(said, list):
        for value in said:
            _check(value, path)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without bars, and without what torchao and torch log about kernels of other machines when it is imported."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
