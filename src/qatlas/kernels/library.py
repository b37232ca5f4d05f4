"""The library of CPU kernels (native/): found, loaded and asked through ctypes. Where it is missing, `library()` is None and says so once.

It is built with the package (setup.py) and uses AVX2, AVX-512, VNNI or NEON where the machine has them. QATLAS_NATIVE names a slower variant, for
tests and comparisons: scalar, avx2, avx512, vnni, vbmi, neon.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.error import QuantError

HERE = Path(__file__).with_name("native")
REMEDY = "install a C++17 compiler (g++, clang++) and build again: `pip install .`, or in a source tree `python setup.py build_ext --inplace`"
LARGEST = 4096                                                    # of a Hadamard block


class Weight(ctypes.Structure):
    """QnMatrix of native.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("stride", ctypes.c_int64), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
                ("group", ctypes.c_int64), ("groups", ctypes.c_int64), ("width", ctypes.c_int32), ("shift", ctypes.c_int32),
                ("whole", ctypes.c_int32), ("part", ctypes.c_float), ("unit", ctypes.c_float), ("low", ctypes.c_float),
                ("table", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                ("zero", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("by_row", ctypes.c_int64), ("by_group", ctypes.c_int64)]


@lru_cache(1)
def library() -> Any:
    """The loaded library, or None; the reason is warned of once."""
    found = sorted(HERE.glob("_native*.so")) + sorted(HERE.glob("_native*.pyd"))
    try:
        if not found:
            raise OSError("it was not built")
        lib = ctypes.CDLL(str(found[-1]))
        _declare(lib)
    except (OSError, AttributeError) as error:
        warnings.warn(f"the CPU kernels for packed weights are not there ({error}); packed layers take the slow path: they dequantize and multiply. "
                      f"For the fast one {REMEDY}", RuntimeWarning, stacklevel=2)
        return None
    if name := os.environ.get("QATLAS_NATIVE"):
        _choose(lib, name)
    return lib


def variants() -> tuple[str, ...]:
    """The variants that this machine runs, the slowest first; none without the library."""
    lib = library()
    return _variants(lib) if lib is not None else ()


def variant() -> str:
    """The one in use; "" without the library."""
    lib = library()
    return str(lib.qn_variant().decode()) if lib is not None else ""


def choose(name: str) -> None:
    """Use another variant from now on, in this process.

    Raises:
        QuantError: one that this machine does not run.
    """
    lib = library()
    if lib is None:
        raise QuantError(f"there is no variant {name!r}: the CPU kernels are not there; {REMEDY}")
    _choose(lib, name)


def hadamard(x: Tensor, block: int, factor: float, out: Tensor | None = None, threads: int | None = None) -> Tensor:
    """Each `block` of x's last axis (a power of two up to 4096 that divides it) times the Walsh-Hadamard matrix of +-1, times `factor`, in natural
    order (H_4 = H_2 kron H_2). x: fp32 on CPU, contiguous; out: as x, may be x. It has no gradient: callers own theirs.

    Raises:
        QuantError: what it does not take, or no library.
    """
    lib = library()
    if lib is None:
        raise QuantError(f"the CPU kernels are not there; {REMEDY}")
    if block < 1 or block > LARGEST or block & (block - 1) or x.dim() < 1 or x.shape[-1] % block:
        raise QuantError(f"a Hadamard block is a power of two up to {LARGEST} that divides the last axis; got {block} for {tuple(x.shape)}")
    out = torch.empty_like(x) if out is None else out
    for t in (x, out):
        if t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous() or t.shape != x.shape:
            raise QuantError(f"the Hadamard kernel takes contiguous fp32 tensors of one shape on CPU, not {t.dtype} {tuple(t.shape)} on {t.device}")
    lib.qn_hadamard(x.data_ptr(), out.data_ptr(), x.numel() // block, block, factor, threads or torch.get_num_threads())
    return out


def _variants(lib: Any) -> tuple[str, ...]:
    names = (ctypes.c_char_p * 16)()
    return tuple(name.decode() for name in names[: lib.qn_variants(names, 16)] if name)


def _choose(lib: Any, name: str) -> None:
    if not lib.qn_choose(name.encode()):
        raise QuantError(f"this machine does not run the variant {name!r} of the CPU kernels; it runs {', '.join(_variants(lib))}")


def _declare(lib: Any) -> None:
    pointer, many, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    weight = ctypes.POINTER(Weight)
    for name, result, arguments in (
            ("qn_linear", None, (weight, pointer, many, pointer, pointer, threads)),
            ("qn_linear_int8", None, (weight, pointer, many, pointer, pointer, pointer, pointer, pointer, threads)),
            ("qn_hadamard", None, (pointer, pointer, many, many, ctypes.c_float, threads)),
            ("qn_tokens", None, (pointer, many, many, *(ctypes.c_float,) * 4, pointer, pointer, threads)),
            ("qn_variants", threads, (ctypes.POINTER(ctypes.c_char_p), threads)),
            ("qn_variant", ctypes.c_char_p, ()),
            ("qn_choose", threads, (ctypes.c_char_p,))):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
