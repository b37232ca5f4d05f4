"""What formats of packed integers have in common: which grids are integers, how far a step reaches, and codes as 32-bit words.

A format that knows s (q - z) with integers q and z holds a trained s (v - z') where, with a power of two k, all k v are integers:
(s / k) (k v - k z') is the same fp32 number. A step that serves more elements than the format's own repeats.

Words are little-endian, as safetensors is, and dense: element i of a row lies at bit i * bits of that row, and may straddle two words.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import torch
from torch import Tensor

from ..core.error import FormatError
from ..core.grain import Grain
from ..core.grid import Grid
from ..core.qtensor import QTensor, pack_bits, unpack_bits

TIMES = tuple(2**i for i in range(8))


def integers(grid: Grid, bits: int) -> tuple[int, int] | None:
    """The power of two k and the shift m for which all k v - m are signed integers of so many bits; None where there are none.

    >>> from qatlas.core.grid import HalfStep, Uniform
    >>> integers(Uniform(4), 4), integers(Uniform(4, False), 4), integers(HalfStep(2), 3), integers(HalfStep(2), 2)
    ((1, 0), (1, 8), (2, 0), None)
    """
    values, half = grid.values(), 2 ** (bits - 1)
    for k in TIMES:
        v = values * k
        low, high = int(v.min()), int(v.max())
        if bool((v.round() == v).all()) and high - low < 2 * half:
            return k, 0 if low >= -half and high < half else low + half
    return None


@lru_cache(maxsize=256)
def sharing(grain: Grain, shape: tuple[int, ...]) -> int | None:
    """How many neighbours along the inputs share a step: all of them for one step a row or coarser; None where that is no one number.

    >>> from qatlas.core.grain import Block, Group, PerTensor
    >>> sharing(Group(32), (4, 64)), sharing(PerTensor(), (4, 64)), sharing(Block(2, 16), (4, 64))
    (32, 64, 16)
    """
    groups = grain.scale_shape(shape)
    row = spread(grain, torch.arange(math.prod(groups), dtype=torch.int32).reshape(groups), shape)     # (out, in)
    ends = torch.nonzero(row[0, 1:] != row[0, :-1])
    size = int(ends[0]) + 1 if len(ends) else shape[1]
    each = row.unflatten(-1, (-1, size)) if shape[1] % size == 0 else None
    return size if each is not None and bool((each == each[..., :1]).all()) else None


def spread(grain: Grain, steps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What belongs to each step, for each element: (the grain's) -> (out, in)."""
    return grain.back(steps.unsqueeze(-1).expand(grain.view(torch.empty(shape, device="meta")).shape), shape)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) uint8 -> (rows, ceil(n bits / 32)) int32, dense from the low end.

    >>> words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8), 4)
    tensor([[-2023406815,           9]], dtype=torch.int32)
    """
    stream = pack_bits(codes, bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4)).clone(memory_format=torch.contiguous_format)   # strides of one row too
    assert sys.byteorder == "little", "safetensors is little-endian, and so are these words"
    return stream.view(torch.int32)


def unwords(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `words`: (rows, ceil(n bits / 32)) int32 -> (rows, n) uint8.

    Raises:
        FormatError: words that do not hold n codes a row.

    >>> unwords(words(torch.arange(11, dtype=torch.uint8).reshape(1, 11) % 8, 3), 3, 11)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]], dtype=torch.uint8)
    """
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != -(-n * bits // 32):
        raise FormatError(f"{n} codes of {bits} bits a row do not lie in {packed.dtype} of shape {tuple(packed.shape)}")
    stream = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)        # (rows, 4 words)
    return unpack_bits(stream[:, : -(-n * bits // 8)].contiguous(), bits, (packed.shape[0], n))


def each(tensor: QTensor, steps: Tensor, size: int) -> Tensor:
    """One value for each `size` inputs: (the grain's) -> (out, in / size)."""
    return spread(tensor.grain, steps, tuple(tensor.shape))[:, ::size].contiguous().cpu()
