"""The types in which an artefact stores steps and offsets: their smallest numbers, and rounding to them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24, "float8_e4m3fn": 2.0**-9, "float8_e8m0fnu": 2.0**-127}


def rounded(t: Tensor, dtype: str) -> Tensor:
    """The nearest numbers of `dtype`, in the type of t; what is too large becomes its largest."""
    kind = getattr(torch, dtype)
    return t.clamp(-torch.finfo(kind).max, torch.finfo(kind).max).to(kind).to(t.dtype)


@lru_cache
def lifted(floor: float, dtype: str) -> float:
    """The smallest number of `dtype` that is not below floor; fp32 keeps floor itself, which every wider type can compare with."""
    kind = getattr(torch, dtype)
    near = float(torch.tensor(floor).to(kind).float())
    if dtype == "float32" or near >= floor:
        return floor if dtype == "float32" else near
    return float(torch.tensor(floor + max(floor * torch.finfo(kind).eps, SMALLEST[dtype])).to(kind).float())
