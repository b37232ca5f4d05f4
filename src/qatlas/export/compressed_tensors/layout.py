"""A layer as the tensors of compressed-tensors: codes, steps and zeros, by the names that stand behind the layer's in the file.

    pack-quantized      weight_packed int32 (out, ceil(in bits / 32)), weight_shape int64 (2,), weight_scale (out, groups),
                        weight_zero_point int32 (ceil(out bits / 32), groups) where there are zeros
    int-quantized       weight int8 (out, in), weight_scale, weight_zero_point int8 as weight_scale
    float-quantized     weight float8_e4m3fn (out, in), weight_scale
    mxfp4-...           weight_packed uint8 (out, in / 2), weight_scale uint8 (out, in / 32): the exponent + 127
    nvfp4-...           weight_packed, weight_scale float8_e4m3fn (out, in / 16), weight_global_scale fp32 (1,), by which the reader divides

Steps lie in the type that they were trained in. Those beside zeros lie in fp32: transformers reads such layers with `dequantize=True` alone, and
multiplies them in the type in which the step lies, bf16 would round the products.

Integers q are signed and stored as q + 2^(bits - 1), a dense stream of bits that begins at the low end of the first word of each row; zeros lie in
the same way along the outputs. Words are little-endian, as safetensors is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.qtensor import QTensor, pack_bits
from ..folder import narrow
from ..integers import each, integers, sharing, words
from .kinds import Kind


@dataclass
class Stored:
    """A layer's tensors, and what its group says of them: how many inputs share a step, whether that is all of them, whether there are no zeros."""

    tensors: dict[str, Tensor]
    size: int
    whole: bool
    symmetric: bool


def store(tensor: QTensor, kind: Kind) -> Stored:
    """A QTensor that `fitting.why_not` let through, in the kind's layout."""
    shape = tuple(tensor.shape)
    size = sharing(tensor.grain, shape) or shape[1]
    size = kind.sizes if isinstance(kind.sizes, int) else size
    whole = size == shape[1] and not isinstance(kind.sizes, int)
    if kind.type == "int":
        tensors, symmetric = _whole(tensor, kind, size)
        return Stored(tensors, size, whole, symmetric)
    if kind.bits == 8:
        scale = narrow(each(tensor, tensor.steps, size), tensor.scale_dtype)
        return Stored({"weight": tensor.codes.cpu().view(torch.float8_e4m3fn), "weight_scale": scale}, size, whole, True)
    packed = {"weight_packed": pack_bits(tensor.codes.cpu(), 4)}
    if isinstance(tensor.scale, QTensor):
        inner = each(tensor, tensor.scale.codes, size).view(torch.float8_e4m3fn)
        top = 1 / tensor.scale.steps.reshape(1).float().cpu()
        return Stored(packed | {"weight_scale": inner, "weight_global_scale": top}, size, whole, True)
    exponent = torch.frexp(each(tensor, tensor.steps, size)).exponent - 1
    return Stored(packed | {"weight_scale": (exponent + 127).to(torch.uint8)}, size, whole, True)


def _whole(tensor: QTensor, kind: Kind, size: int) -> tuple[dict[str, Tensor], bool]:
    found = integers(tensor.grid, kind.bits)
    assert found is not None, "why_not has let it through"
    (k, m), half = found, 2 ** (kind.bits - 1)
    q = (tensor.values() * k - m).to(torch.int16).cpu()           # (out, in), -half ... half - 1
    zero = None
    steps = each(tensor, tensor.steps, size) / k
    out = {"weight_scale": narrow(steps, tensor.scale_dtype if tensor.zero is None and not m else "float32")}
    if tensor.zero is not None or m:
        place = torch.zeros_like(tensor.steps) if tensor.zero is None else tensor.zero
        zero = each(tensor, place * k - m, size).to(torch.int16)
    if not kind.packed:
        out = {"weight": q.to(torch.int8), **out}
        return out if zero is None else out | {"weight_zero_point": zero.to(torch.int8)}, zero is None
    out = {"weight_packed": words((q + half).to(torch.uint8), kind.bits), "weight_shape": torch.tensor(q.shape), **out}
    if zero is not None:
        out["weight_zero_point"] = words((zero + half).to(torch.uint8).T.contiguous(), kind.bits).T.contiguous()
    return out, zero is None
