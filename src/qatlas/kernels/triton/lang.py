"""Triton's language, or its absence. Every kernel of this folder takes `jit` and `tl` from here, so that its file can be read without Triton.

Triton decides when it is imported whether kernels are compiled or interpreted: TRITON_INTERPRET=1 must be set before. Interpreted, kernels run on CPU
tensors, slowly and with numpy's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ...core.error import RunError

ABSENT = ""
try:
    import triton
    import triton.language as tl
except ImportError as _error:                                     # no wheel for this system, or a broken one
    triton = tl = None
    ABSENT = f"Triton is not here ({_error}); pip install triton (torch for CUDA brings it)"

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any]) -> Any:
    """A kernel, or a part of one. Without Triton the plain function, which nobody calls."""
    return function if triton is None else triton.jit(function)


def why_not_here(device: torch.device) -> str:
    """Why kernels cannot run on tensors of this device; nothing where they can."""
    if ABSENT:
        return ABSENT
    if device.type == "cuda":
        if INTERPRETED:
            return "TRITON_INTERPRET is set: kernels are interpreted on CPU; unset it to use the GPU"
        least = (8, 0) if torch.version.hip is None else (0, 0)
        return "" if capability(device) >= least else f"a GPU of compute capability {capability(device)}; these kernels are for 8.0 and later"
    if device.type == "cpu" and INTERPRETED:
        return ""
    hint = "; to try kernels on CPU set TRITON_INTERPRET=1 before Triton is imported" if device.type == "cpu" else ""
    return f"Triton kernels run on CUDA devices, not on {device.type}{hint}"


def need(device: torch.device) -> None:
    """
    Raises:
        RunError: kernels cannot run there.
    """
    if reason := why_not_here(device):
        raise RunError(f"no Triton kernel: {reason}")


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; of the interpreter one that can do everything."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (99, 0)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, fuse: bool = True, **constants: Any) -> None:
    """Run a kernel on the device of its first argument. `fuse=False` forbids a product and a sum to become one rounding."""
    device = arguments[0].device
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=fuse)


def power(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> power(5), power(8), power(0)
    (8, 8, 1)
    """
    return 1 << max(n - 1, 0).bit_length()
