"""Rotations by the Walsh-Hadamard kernel, in place of the products of core/hadamard.py: one pass over memory, with a gradient, seen by compilers.

    quick(maps)        the maps of a transform, turned by the kernel from now on where it can; all else stays with core's

It can where the library is there, on CPU, for numbers in fp32 and blocks of a power of two up to 4096. Its sums are in another order than core's, so
the last bits differ; both are the same matrix, which is its own inverse and so its own gradient. What QuEST's rotation costs with it stands in
docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.hadamard import hadamard
from ..core.transform import Maps, Rotate
from . import library


@torch.library.custom_op("qatlas::turn", mutates_args=(), device_types="cpu")
def turn(x: Tensor, block: int) -> Tensor:
    """Each block of the last axis times H / sqrt(block). x (..., n): fp32 on CPU."""
    return library.hadamard(x.contiguous(), block, block**-0.5)


@turn.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return turn(g, ctx.block), None


def _remember(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


turn.register_autograd(_backward, setup_context=_remember)


def turned(x: Tensor, transpose: bool = False) -> Tensor:
    """core's `hadamard`, of x (..., block), by the kernel where it can.

    >>> turned(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    block = x.shape[-1]
    able = x.dtype == torch.float32 and x.device.type == "cpu" and block & (block - 1) == 0 and 1 < block <= library.LARGEST
    if not able or library.library() is None:
        return hadamard(x, transpose)
    y: Tensor = turn(x, block)
    return y


def quick(maps: Maps) -> Maps:
    """Let the kernel turn what these maps turn; returns them."""
    for part in maps.modules():
        if isinstance(part, Rotate):
            part.turn = turned
    return maps
