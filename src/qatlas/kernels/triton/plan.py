"""How a product is cut into programs. A guess from the shape, which is right where bytes are all that matters, or the fastest of some, measured.

`tune` measures on the device and remembers by shape for as long as the process lives; without it nothing is measured and nothing is random: the same
shape is cut in the same way, and so gives the same bits, on every machine with as many processors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .matrix import Packed


@dataclass(frozen=True)
class Plan:
    """bn: rows of the weight in a program. bm: rows of activations. bk: inputs at a time (products of tiles). gb: parts of groups at a time (gemv).
    splits: programs that share a row's inputs. warps, stages: of a program."""

    bn: int = 16
    bm: int = 16
    bk: int = 64
    gb: int = 8
    splits: int = 1
    warps: int = 4
    stages: int = 3


Key = tuple[str, int, int, int, int, int]
FOUND: dict[Key, Plan] = {}


def key(kind: str, matrix: Packed, batch: int) -> Key:
    """What a plan depends on."""
    return kind, matrix.rows, matrix.width, matrix.bits, matrix.group, batch


def plan(kind: str, matrix: Packed, batch: int, wide: int = 128) -> Plan:
    """The plan of a product: the measured one, or a guess. kind: "gemv", "gemm" or "int8"; wide: the most inputs at a time that the kernel allows."""
    found = FOUND.get(key(kind, matrix, batch))
    return found or guess(kind, matrix, batch, processors(matrix.codes.device), wide)


def guess(kind: str, matrix: Packed, batch: int, many: int, wide: int = 128) -> Plan:
    """Tiles as large as still give every processor two programs."""
    if kind == "gemv":
        bn, splits = 16, 1
        while bn > 4 and matrix.rows < 2 * bn * many:
            bn //= 2
        while splits < 8 and matrix.rows * splits < bn * many and matrix.width >= 4096 * splits:
            splits *= 2
        return Plan(bn=bn, gb=8, splits=splits)
    bm = 16 if batch <= 16 else 32 if batch <= 32 else 64 if batch <= 64 else 128
    bn = 64 if bm <= 64 else 128
    splits, tiles = 1, -(-matrix.rows // bn) * -(-batch // bm)
    while kind == "gemm" and splits < 8 and tiles * splits < many and matrix.width >= 1024 * splits:
        splits *= 2
    if kind == "int8" and tiles < many and bn > 16:
        bn = 32
    return Plan(bn=bn, bm=bm, bk=min(wide, 128 if bm <= 32 else 64), splits=splits, warps=8 if bn * bm >= 128 * 128 else 4)


def candidates(kind: str, matrix: Packed, batch: int, wide: int = 128) -> list[Plan]:
    """Plans worth a measurement, the guess first."""
    first = guess(kind, matrix, batch, processors(matrix.codes.device), wide)
    if kind == "gemv":
        some = [replace(first, bn=bn, gb=gb, splits=splits, warps=warps, stages=stages) for bn in (4, 8, 16, 32) for gb in (4, 8, 16)
                for splits in (1, 2, 4) for warps in (2, 4, 8) for stages in (2, 4) if bn * gb <= 256]
    else:
        some = [replace(first, bn=bn, bm=bm, bk=bk, splits=splits, warps=warps, stages=stages) for bn in (32, 64, 128)
                for bm in {first.bm, max(first.bm // 2, 16)} for bk in {min(wide, k) for k in (32, 64, 128)}
                for splits in ((1, 2, 4) if kind == "gemm" and batch <= 64 else (1,)) for warps in (4, 8) for stages in (2, 4)]
    return [first, *(p for p in dict.fromkeys(some) if p != first)]


def tune(kind: str, matrix: Packed, batch: int, seconds: Callable[[Plan], float], wide: int = 128, most: int = 1000) -> Plan:
    """Measure at most so many plans by `seconds` and keep the fastest. A plan that the device cannot hold is passed over."""
    best, least = None, float("inf")
    for candidate in candidates(kind, matrix, batch, wide)[:most]:
        try:
            took = seconds(candidate)
        except Exception as error:                                # shared memory or registers: the compiler's errors are of many kinds
            if best is None and isinstance(error, AssertionError):
                raise
            continue
        if took < least:
            best, least = candidate, took
    if best is not None:
        FOUND[key(kind, matrix, batch)] = best
    return best or candidates(kind, matrix, batch, wide)[0]


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Of a device; 1 of the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
