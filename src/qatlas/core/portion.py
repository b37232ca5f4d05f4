"""Portions: a row-wise function of a large matrix, run on as many rows at a time as a cache holds.

The formula and its gradients make some temporaries of the size of their input. For a large weight each of them is fresh memory, and the system's page
faults cost several times the arithmetic. On portions of rows the temporaries are small, stay in the cache and are given out again. The numbers are
the same: an element's answer is its own, and a sum goes along one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIZE = 2**18                                                      # elements of a portion: 1 MiB in fp32


def divides(x: Tensor, *others: Tensor | None) -> bool:
    """Whether x (..., n) is worth portions, and each of the others has x's rows."""
    large = x.device.type == "cpu" and x.dim() > 1 and x.numel() > 4 * SIZE and x.shape[-1] <= SIZE
    return large and not torch.compiler.is_compiling() and all(t.shape[:-1] == x.shape[:-1] for t in others if t is not None)


def in_portions(f: Callable[..., Sequence[Tensor | None]], *tensors: Tensor | None, into: Tensor | None = None) -> list[Tensor | None]:
    """f(*tensors), each (..., m) of the same rows, portion by portion; what f returns has those rows, too. into: memory for the first answer."""
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors]
    first = next(t for t in flat if t is not None)
    shape = next(t.shape[:-1] for t in tensors if t is not None)
    rows = max(SIZE // first.shape[-1], 1)
    answers: list[Tensor | None] = []
    for start in range(0, len(first), rows):
        part = f(*(None if t is None else t[start : start + rows] for t in flat))
        answers = answers or [None if a is None else a.new_empty(len(first), a.shape[-1]) if i or into is None else into.view(len(first), -1)
                              for i, a in enumerate(part)]
        for whole, a in zip(answers, part, strict=True):
            if whole is not None and a is not None:
                whole[start : start + rows] = a
    return [None if a is None else a.view(*shape, a.shape[-1]) for a in answers]
