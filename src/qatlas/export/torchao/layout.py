"""A layer as the tensors of torchao's IntxUnpackedToInt8Tensor, under the names that stand behind the layer's in the file, and back.

    _weight_qdata        int8 (out, in)             the integers q, -2^(bits - 1) ... 2^(bits - 1) - 1
    _weight_scale        fp32 (out, in / size)
    _weight_zero_point   int8 (out, in / size)      0 where there is none

The header of the file has a line of JSON for every parameter: the class and its attributes for these, {"_type": "Tensor"} for plain ones. Reading
takes the blocks that torchao knows besides: whole rows, whole tensors and tiles; steps in fp16 or bf16, zeros that are floats. A tensor that
declares another type than fp32 computes in that type; what is read here is its decode after `.to(torch.float32)`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.grain import Block, Grain, Group, PerChannel, PerTensor
from ...core.grid import Uniform
from ...core.qtensor import QTensor
from ..integers import each, integers, sharing
from .fitting import NAME, Kind

CLASS = "IntxUnpackedToInt8Tensor"
PARTS = ("qdata", "scale", "zero_point")
DYNAMIC = "int8_asym_per_token"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Stored:
    """A layer's tensors by part, its attributes, whether one step serves a whole row, and whether there are no zeros."""

    tensors: dict[str, Tensor]
    said: dict[str, Any]
    size: int
    whole: bool
    symmetric: bool


def store(tensor: QTensor, kind: Kind) -> Stored:
    """A QTensor that `fitting.why_not` let through, in the kind's layout."""
    found = integers(tensor.grid, kind.bits)
    assert found is not None, "why_not has let it through"
    k, m = found
    size = sharing(tensor.grain, tuple(tensor.shape)) or tensor.shape[1]
    place = torch.zeros_like(tensor.steps) if tensor.zero is None else tensor.zero
    zero = each(tensor, place * k - m, size).to(torch.int8)       # (out, in / size)
    q = (tensor.values() * k - m).to(torch.int8).cpu()            # (out, in)
    said = {"target_dtype": _dtype(f"int{kind.bits}"), "block_size": [1, size], "dtype": _dtype("float32"),
            "activation_quantization": DYNAMIC if kind.dynamic else None}
    parts = {"qdata": q.contiguous(), "scale": (each(tensor, tensor.steps, size) / k).float(), "zero_point": zero}
    return Stored(parts, {"_type": CLASS, "_data": said, "_tensor_data_names": list(PARTS)}, size, size == tensor.shape[1], not bool(zero.any()))


def declared(header: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The header's lines, parsed: name -> what is said of it.

    Raises:
        FormatError: no header of torchao's, or lines that are no JSON objects.
    """
    try:
        names = json.loads(header.get("tensor_names", ""))
        out = {name: json.loads(header[name]) for name in names}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"model.safetensors has no header of {NAME}'s ({error!r}): it says for no tensor, or not for all, what it is. "
                          "Save it again with torchao >= 0.15, as safetensors") from None
    if not names or not isinstance(names, list) or len(set(names)) != len(names) or not all(isinstance(one, dict) for one in out.values()):
        raise FormatError(f"model.safetensors has no header of {NAME}'s: tensor_names must be a list of different names, each with an object")
    return out


def parts(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one weight, by part.

    Raises:
        FormatError: one is missing.
    """
    layer, _, leaf = name.rpartition(".")
    try:
        return {part: tensors[f"{layer}._{leaf}_{part}"] for part in PARTS}
    except KeyError as missing:
        raise FormatError(f"model.safetensors: {name} lacks {missing.args[0]}; the copy is not complete") from None


def load(name: str, said: dict[str, Any], part: dict[str, Tensor]) -> QTensor:
    """The QTensor of one weight: `dequantize()` is torchao's own in fp32, bit for bit.

    Raises:
        FormatError: attributes that are none of torchao's, or tensors that are not theirs.
    """
    bits, block = _attributes(name, said)
    q, scale, zero = (part[one] for one in PARTS)
    if q.dtype != torch.int8 or q.dim() != 2 or 0 in q.shape:
        raise _wrong(name, f"qdata is {_is(q)}; it is an int8 matrix")
    if q.shape[0] % block[0] or q.shape[1] % block[1]:
        raise _wrong(name, f"blocks of {block[0]} x {block[1]} do not tile qdata, {_is(q)}")
    want = (q.shape[0] // block[0], q.shape[1] // block[1])
    for one, tensor, types in (("scale", scale, FLOATS.values()), ("zero_point", zero, (torch.int8, *FLOATS.values()))):
        if tuple(tensor.shape) != want or tensor.dtype not in types:
            raise _wrong(name, f"{one} is {_is(tensor)}; with blocks of {block[0]} x {block[1]} it is {want}, of {', '.join(map(_short, types))}")
        if not bool(torch.isfinite(tensor).all()):
            raise _wrong(name, f"{one} holds NaN or infinity")
    half = 2 ** (bits - 1)
    if int(q.min()) < -half or int(q.max()) >= half:
        raise _wrong(name, f"qdata reaches from {int(q.min())} to {int(q.max())}, beyond {bits} bits")
    grain = _grain(block, (q.shape[0], q.shape[1]))
    groups = grain.scale_shape(tuple(q.shape))
    some = zero.float().reshape(groups) if bool(zero.any()) else None
    return QTensor((q.to(torch.int16) + half).to(torch.uint8), scale.float().reshape(groups), some, None, Uniform(bits), grain, _short(scale.dtype))


def _attributes(name: str, said: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    if said.get("_type") != CLASS:
        raise FormatError(f"{name} is a {said.get('_type')!r} of {NAME}; of its tensors we read {CLASS}")
    data = said.get("_data")
    if not isinstance(data, dict) or set(data) != {"target_dtype", "block_size", "dtype", "activation_quantization"}:
        raise _wrong(name, f"its attributes are {sorted(data) if isinstance(data, dict) else data!r}")
    called = said.get("_tensor_data_names")
    if not isinstance(called, list) or sorted(map(str, called)) != sorted(PARTS):
        raise _wrong(name, f"its tensors are called {called!r}")
    bits = next((b for b in range(1, 9) if data["target_dtype"] == _dtype(f"int{b}")), None)
    if bits is None:
        raise _wrong(name, f"target_dtype is {data['target_dtype']!r}; it is int1 to int8")
    if data["dtype"] not in [_dtype(kind) for kind in FLOATS]:
        raise _wrong(name, f"dtype is {data['dtype']!r}; it is one of {', '.join(FLOATS)}")
    if data["activation_quantization"] not in (None, DYNAMIC):
        raise _wrong(name, f"activation_quantization is {data['activation_quantization']!r}; it is null or {DYNAMIC!r}")
    block = data["block_size"]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise _wrong(name, f"block_size is {block!r}; it is two positive whole numbers")
    return bits, (block[0], block[1])


def _grain(block: tuple[int, int], shape: tuple[int, int]) -> Grain:
    if block[0] == 1:
        return PerChannel() if block[1] == shape[1] else Group(block[1])
    return PerTensor() if block == shape else Block(*block)


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is(tensor: Tensor) -> str:
    return f"{_short(tensor.dtype)} {tuple(tensor.shape)}"


def _wrong(name: str, what: str) -> FormatError:
    return FormatError(f"model.safetensors: {name}: {what}. The file is damaged, or not {NAME}'s; write it anew")
