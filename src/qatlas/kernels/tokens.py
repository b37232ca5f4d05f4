"""Inputs to whole numbers by a kernel: the codes and steps that a layer's own input quantizer would make, in two passes over a token.

    step = max(max|x| / reach, floor)        code = clamp(round(x / step))        bit for bit as core's AbsMax and Uniform

In torch's eager lines the same takes a dozen operators, each with a tensor of its own: for one token that is all overhead, and dearer than the
product that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.grain import PerToken
from ..core.grid import Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax
from .library import library


def why_not(quant: Quant) -> str:
    """Why the kernel does not make these codes; "" where it does."""
    if type(quant.grid) is not Uniform or quant.grid.signed is not True or not 2 <= quant.grid.bits <= 8:
        return "its grid is not of signed whole numbers of 2 to 8 bits"
    if type(quant.grain) is not PerToken or quant.refit or quant.clip is not None:
        return "it is not one step a token, or its values are refitted or cut"
    scale = quant.scale
    if type(scale) is not AbsMax or scale.nested is not None or scale.dtype != "float32" or scale.sign != "positive" or scale.inverse:
        return "its step is not the largest value over the grid's end, in fp32"
    if scale.reach is not None and scale.reach < quant.grid.high / 64:
        return "its step is so small that places leave what the kernel rounds"
    return "" if library() is not None else "the CPU kernels were not built"


def tokens(x: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
    """x (..., n) fp32 on CPU -> (codes int8 (..., n), steps (...) fp32). A token with NaN or an infinity has the step NaN.

    >>> from qatlas.core.grain import PerToken
    >>> tokens(torch.tensor([[-127.0, 0.5, 3.0]]), Quant(Uniform(8), PerToken()))
    (tensor([[-127,    0,    3]], dtype=torch.int8), tensor([1.]))
    """
    x = x.contiguous()
    codes, steps = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1])
    scale, grid = quant.scale, quant.grid
    reach = grid.high if scale.reach is None else scale.reach     # type: ignore[attr-defined]
    library().qn_tokens(x.data_ptr(), steps.numel(), x.shape[-1], reach, scale.smallest, grid.low, grid.high, codes.data_ptr(), steps.data_ptr(),
                        torch.get_num_threads())
    return codes, steps
