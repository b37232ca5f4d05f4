"""GPTQ directories, of ours and of others, as QTensors.

Nothing is computed but integers: codes and zeros are unpacked, steps stay what they are, so `dequantize()` is the decode of AutoGPTQ and GPTQModel in
fp32, bit for bit. Bits, inputs and outputs of a layer follow from the shapes of its tensors, which must agree with one another and with config.json
(GPTQModel's `dynamic` may say otherwise layer by layer; then the shapes alone count).

desc_act: inputs were sorted before they were grouped, and g_idx says the group of each. Such a layer has the grain Scattered; every group must have
as many inputs as the others.

Refused, with the reason: layouts of engines (marlin, bitblas, the planar one of 5 to 7 bits), words of other sizes than 32 bits, a g_idx of uneven
groups (also one that was never filled in), v1 zeros on which readers disagree (layout.py), layers with parts that we do not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.qtensor import QTensor
from ..shards import Stored, headers, quantization, tensors
from .layout import NAME, V1, V2, Parts, restore

OLD = "quantize_config.json"                                      # where AutoGPTQ wrote it before config.json had a place
STEPS = {"F16", "BF16", "F32"}


def holds(path: str | Path) -> bool:
    """Whether a directory is of this format, by its config alone."""
    try:
        return bool(config(path))
    except FormatError:
        return False


def config(path: str | Path) -> dict[str, Any]:
    """What a directory says of its quantization.

    Raises:
        FormatError: no such directory, or another method.
    """
    return quantization(path, NAME, OLD)


def qtensors(path: str | Path) -> dict[str, QTensor | Tensor]:
    """Every tensor of a directory under its Hugging Face name: weights of quantized layers as QTensors (out, in), all else as it is.

    Raises:
        FormatError: no such directory, another method, a layout or a file that we cannot read exactly (see above).
    """
    said = config(path)
    first = first_zero(said, path)
    found = headers(path)
    layers = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    shapes = {layer: shape_of(layer, found, said) for layer in sorted(layers)}
    out: dict[str, QTensor | Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(found):
        layer, _, part = name.rpartition(".")
        if layer not in layers or part == "bias":
            out[name] = tensor
            continue
        mine = parts.setdefault(layer, {})
        mine[part] = tensor
        if set(mine) >= {other for other in Parts._fields if f"{layer}.{other}" in found}:
            out[f"{layer}.weight"] = _layer(layer, parts.pop(layer), shapes[layer], said, first)
    return out


def first_zero(said: Mapping[str, Any], path: str | Path) -> int:
    """1 where zeros are stored less one, 0 where they are not."""
    form = said.get("checkpoint_format") or said.get("format") or V1
    if said.get("is_marlin_format") or form not in (V1, V2):
        raise FormatError(f"{path} lies in the layout {'marlin' if said.get('is_marlin_format') else form!r}, which is made for one engine; "
                          f"{V1} and {V2} can be read")
    if (dtype := said.get("pack_dtype", "int32")) != "int32":
        raise FormatError(f"{path} packs codes into {dtype}; int32 can be read")
    bits, size = said.get("bits"), said.get("group_size", -1)
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool) or type(size) is not int or not (size == -1 or size > 0):
        raise FormatError(f"{path} says bits={bits!r}, group_size={size!r}; GPTQ has 2, 3, 4 or 8 bits, and a group of inputs, or -1 for all")
    return int(form == V1)


def shape_of(layer: str, found: Mapping[str, Stored], said: Mapping[str, Any]) -> tuple[int, int, int]:
    """Bits, inputs, groups of a layer, by the headers alone."""
    if strange := [name for name in found if name.startswith(f"{layer}.") and name.removeprefix(f"{layer}.") not in (*Parts._fields, "bias")]:
        raise FormatError(f"{strange[0]} is a part that GPTQ does not know, and may mean that {layer} computes something else")
    for part in ("qzeros", "scales"):
        if f"{layer}.{part}" not in found:
            raise FormatError(f"{layer} has a qweight and no {part}; the copy is not complete")
    word, zero, scale = (found[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if (word.dtype, zero.dtype) != ("I32", "I32") or scale.dtype not in STEPS or not len(word.shape) == len(zero.shape) == len(scale.shape) == 2:
        raise FormatError(f"{layer}: qweight is {word.dtype} {word.shape}, qzeros {zero.dtype} {zero.shape}, scales {scale.dtype} {scale.shape}; "
                          "these are no I32, I32 and F16 matrices")
    (rows, outputs), (groups, columns) = word.shape, scale.shape
    bits = zero.shape[1] * 32 // columns if columns else 0
    inputs = rows * 32 // bits if bits else 0
    exact = bits in (2, 3, 4, 8) and bits * columns == zero.shape[1] * 32 and bits * inputs == rows * 32
    if not exact or columns != outputs or zero.shape[0] != groups or not groups or not inputs or inputs % groups:
        raise FormatError(f"{layer}: qweight {word.shape}, qzeros {zero.shape} and scales {scale.shape} are not those of one layer of 2, 3, 4 or 8 "
                          "bits")
    index = found.get(f"{layer}.g_idx")
    if index is not None and (index.shape != (inputs,) or index.dtype not in ("I32", "I64")):
        raise FormatError(f"{layer}: g_idx is {index.dtype} {index.shape}, and the layer has {inputs} inputs")
    size = said.get("group_size", -1)
    if not said.get("dynamic") and (bits != said["bits"] or inputs // groups != (inputs if size == -1 else size)):
        raise FormatError(f"{layer} has {bits} bits and groups of {inputs // groups} of its {inputs} inputs, and config.json says "
                          f"bits={said['bits']}, group_size={size}")
    return bits, inputs, groups


def _layer(layer: str, parts: dict[str, Tensor], shape: tuple[int, int, int], said: Mapping[str, Any], first: int) -> QTensor:
    bits, inputs, groups = shape
    if not bool(torch.isfinite(parts["scales"]).all()):
        raise FormatError(f"{layer}: scales hold NaN or infinity")
    meta = said.get("meta")
    writer = str(meta.get("quantizer") if isinstance(meta, dict) else "")
    index = parts.pop("g_idx", None)
    order = () if index is None else order_of(layer, index.long(), groups)
    usual = torch.arange(inputs) // (inputs // groups) if index is None else index
    try:
        return restore(Parts(**parts, g_idx=usual), bits, first, "gptqmodel" in writer.lower(), order)
    except FormatError as error:
        raise FormatError(f"{layer}: {error}") from None


def order_of(layer: str, index: Tensor, groups: int) -> tuple[int, ...]:
    """The inputs, group by group; empty where they stand so already."""
    size = len(index) // groups
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise FormatError(f"{layer}: g_idx names the groups {int(index.min())} ... {int(index.max())}, and there are {groups}")
    if not bool((index.bincount(minlength=groups) == size).all()):
        raise FormatError(f"{layer}: g_idx does not give each of the {groups} groups {size} of the {len(index)} inputs; uneven groups have no "
                          "grain here")
    order = index.argsort(stable=True)
    return () if torch.equal(order, torch.arange(len(index))) else tuple(order.tolist())
