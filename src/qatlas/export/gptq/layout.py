"""A layer as the tensors of GPTQ, and the targets.

    qweight   int32 (in bits / 32, out)       codes, packed along the inputs
    qzeros    int32 (groups, out bits / 32)   zeros, packed along the outputs; v1 stores each zero less one
    scales    fp16 (groups, out)
    g_idx     int32 (in)                      the group of each input: k // group, unless inputs were sorted (desc_act)

Both are dense streams from the low end of a word: with 3 bits 32 codes lie in three words, and the 11th and 22nd straddle two of them, exactly as
AutoGPTQ shifts them together by hand.

What v1 means by a zero whose field is all ones, readers do not agree on: AutoGPTQ and vLLM add one and get 2^bits, GPTQModel adds one to whole words
(2, 4, 8 bits), so that the field becomes 0 and its neighbour one more; with 3 bits it becomes 0. GPTQModel writes its files by the inverse of that,
so its own are read that way, by what `meta` says of their writer; in the files of others such a field is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from .. import grouped
from ..integers import unwords, words

NAME = "gptq"
V1, V2 = "gptq", "gptq_v2"                                        # checkpoint_format
CLASSES = ("Linear", "Conv1D")
KINDS = {**{f"w{bits}": grouped.Kind(NAME, bits, grouped.own(bits), 1, classes=CLASSES) for bits in (2, 3, 4, 8)},
         **{f"w{bits}_v2": grouped.Kind(NAME, bits, grouped.own(bits), classes=CLASSES) for bits in (2, 3, 4, 8)}}
TARGETS: dict[str, Quant | None] = {name: kind.own for name, kind in KINDS.items()}


class Parts(NamedTuple):
    """A layer in a file."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant with its step in fp16, all else kept.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import weight
    >>> fit(weight(4), "w4", (64, 512)).scale.dtype
    'float16'
    """
    return grouped.fit(quant, target, KINDS, shape, body)


def fit_input(quant: Quant | None, target: str, weight: Any, shape: tuple[int, ...], module: str) -> None:
    """Inputs stay in full precision.

    Raises:
        FormatError: a quantized input, or a class of layers that has no place in the format.
    """
    grouped.fit_input(quant, grouped.pick(KINDS, NAME, target), weight, module)


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a weight, a Quant or a QTensor of `shape` (out, in), or None.

    >>> from qatlas.core.grid import Uniform
    >>> why_not(TARGETS["w4"].but(grid=Uniform(5)), "w4", (64, 512))
    'the values of Uniform(bits=5, signed=True, narrow=False) are no integers of 4 bits, nor those over a power of two'
    """
    return grouped.why_not(tensor, grouped.pick(KINDS, NAME, target), shape)


def store(tensor: QTensor, target: str, group: int) -> Parts:
    """A QTensor that `why_not` let through, in groups of so many inputs; -1: all."""
    kind = KINDS[target]
    codes, zeros, steps = grouped.store(tensor, kind, group)
    width = codes.shape[1]
    return Parts(words(codes, kind.bits).T.contiguous(), words((zeros - kind.first).T.contiguous(), kind.bits).contiguous(),
                 steps.T.contiguous(), torch.arange(width, dtype=torch.int32) // (width if group == -1 else group))


def restore(parts: Parts, bits: int, first: int, modular: bool, order: tuple[int, ...]) -> QTensor:
    """The QTensor of a layer. first: 1 for v1, 0 for v2. modular: whether GPTQModel wrote it. order: how its inputs are grouped.

    Raises:
        FormatError: v1 zeros on which readers do not agree.
    """
    outputs, inputs = parts.scales.shape[1], parts.g_idx.shape[0]
    packed = parts.qzeros
    if first and modular and bits != 3:
        ones = sum(1 << at for at in range(0, 32, bits))          # one in each field; the carry goes on, as in GPTQModel
        packed, first = ((packed.long() + ones + 2**31) % 2**32 - 2**31).int(), 0
    zeros = unwords(packed, bits, outputs)                        # (groups, out)
    if first and not modular and (full := int((zeros == 2**bits - 1).sum())):
        raise FormatError(f"{full} of {zeros.numel()} zeros are stored as {2**bits - 1}, which AutoGPTQ reads as {2**bits} and GPTQModel as 0; "
                          "its writer let a zero of 0 wrap around. Write it anew as gptq_v2")
    zeros = (zeros.int() + first) % 2**bits
    codes = unwords(parts.qweight.T.contiguous(), bits, inputs)   # (out, in)
    return grouped.restore(codes, zeros.to(torch.uint8).T.contiguous(), parts.scales.T.contiguous(), bits, order)
