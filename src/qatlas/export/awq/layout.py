"""A layer as the tensors of AWQ's GEMM layout, and the target.

    qweight   int32 (in, out / 8)         codes, packed along the outputs
    qzeros    int32 (groups, out / 8)     zeros as they are, packed in the same way
    scales    fp16 (groups, out)

A word holds the codes of eight outputs, four bits each from the low end, in the order 0 2 4 6 1 3 5 7: its kernels take even and odd halves apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from .. import grouped
from ..integers import unwords, words

NAME = "awq"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
KINDS = {"w4": grouped.Kind(NAME, BITS, grouped.own(BITS), outputs=8)}
TARGETS: dict[str, Quant | None] = {name: kind.own for name, kind in KINDS.items()}


class Parts(NamedTuple):
    """A layer in a file."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant with its step in fp16, all else kept.

    Raises:
        FormatError: what the target cannot hold, with the reason.

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

    >>> why_not(TARGETS["w4"], "w4", (44, 512))
    'its shape (44, 512) (out, in) is no multiple of (8, 32), as the words of this format want it'
    """
    return grouped.why_not(tensor, grouped.pick(KINDS, NAME, target), shape)


def eights(codes: Tensor) -> Tensor:
    """(rows, out) uint8 -> (rows, out / 8) int32.

    >>> import torch
    >>> eights(torch.arange(8, dtype=torch.uint8).reshape(1, 8))[0, 0].item() == 0x75316420
    True
    """
    return words(codes.unflatten(1, (-1, 8))[:, :, list(ORDER)].flatten(1), BITS)


def uneights(packed: Tensor, outputs: int) -> Tensor:
    """The inverse of `eights`."""
    back = sorted(range(8), key=ORDER.__getitem__)
    return unwords(packed, BITS, outputs).unflatten(1, (-1, 8))[:, :, back].flatten(1)


def store(tensor: QTensor, target: str, group: int) -> Parts:
    """A QTensor that `why_not` let through, in groups of so many inputs; -1: all."""
    codes, zeros, steps = grouped.store(tensor, KINDS[target], group)
    return Parts(eights(codes.T.contiguous()), eights(zeros.T.contiguous()), steps.T.contiguous())


def restore(parts: Parts) -> QTensor:
    """The QTensor of a layer."""
    outputs = parts.scales.shape[1]
    codes, zeros = uneights(parts.qweight, outputs), uneights(parts.qzeros, outputs)
    return grouped.restore(codes.T.contiguous(), zeros.T.contiguous(), parts.scales.T.contiguous(), BITS)
