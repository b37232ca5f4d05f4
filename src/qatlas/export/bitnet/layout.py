"""Four rows in a byte. A matrix (out, in) of -1, 0, 1 is cut into four stripes of out / 4 rows; byte [i, k] holds t + 1 of rows i, i + out / 4,
i + 2 out / 4 and i + 3 out / 4 in its bits 0-1, 2-3, 4-5 and 6-7. The value 3 stands for nothing.

    weight          uint8 (out / 4, in)
    weight_scale    fp32 (1,): the inverse of the step for BitLinear, the step for AutoBitLinear
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.grain import PerTensor
from ...core.grid import Ternary
from ...core.qtensor import QTensor

ROWS = 4                                                          # in a byte


def stripes(t: Tensor) -> Tensor:
    """(out, in) of -1, 0, 1 -> (out / 4, in) uint8.

    >>> stripes(torch.tensor([[-1.0], [0.0], [1.0], [1.0]]))
    tensor([[164]], dtype=torch.uint8)
    """
    parts = (t.to(torch.int8) + 1).to(torch.uint8).unflatten(0, (ROWS, -1))      # (4, out / 4, in)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def codes(packed: Tensor) -> Tensor:
    """The inverse: t + 1, (out, in) uint8 in 0 ... 3.

    >>> codes(torch.tensor([[164]], dtype=torch.uint8)).T
    tensor([[0, 1, 2, 2]], dtype=torch.uint8)
    """
    return torch.cat([packed >> 2 * j & 3 for j in range(ROWS)])


def load(name: str, weight: Tensor | None, scale: Tensor, divides: bool) -> QTensor:
    """The QTensor of one layer. divides: the scale is the inverse of the step.

    Raises:
        FormatError: tensors that are not a layer's.
    """
    if scale.dtype not in (torch.float32, torch.float16, torch.bfloat16) or scale.numel() != 1:
        raise _wrong(name, f"weight_scale is {scale.dtype} {tuple(scale.shape)}; it is one floating number")
    step = 1 / scale.float().reshape(1) if divides else scale.float().reshape(1)
    if not bool(torch.isfinite(step) & (step != 0)):
        raise _wrong(name, f"weight_scale is {float(scale)}, which gives a step of {float(step)}")
    if weight is None or weight.dim() != 2 or 0 in weight.shape:
        raise _wrong(name, f"weight is {'missing' if weight is None else f'{weight.dtype} {tuple(weight.shape)}'}; it is a matrix")
    if weight.dtype == torch.uint8:
        found = codes(weight)                                     # (out, in)
        if int(found.max()) > 2:
            raise _wrong(name, "a byte holds 3 where 0, 1 and 2 stand for -1, 0 and 1")
    elif weight.is_floating_point() and not divides and bool(((weight == 0) | (weight.abs() == 1)).all()):
        found = (weight + 1).to(torch.uint8)                      # AutoBitLinear takes -1, 0, 1 as they are, too
    else:
        raise _wrong(name, f"weight is {weight.dtype} {tuple(weight.shape)}; it is uint8, {ROWS} rows a byte")
    return QTensor(found, step, None, None, Ternary(), PerTensor())


def _wrong(name: str, what: str) -> FormatError:
    return FormatError(f"model.safetensors: {name}: {what}. The file is damaged, or no BitNet checkpoint; write it anew")
