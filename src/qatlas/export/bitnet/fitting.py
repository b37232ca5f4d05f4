"""Which trained numbers a BitNet checkpoint holds exactly, and the rule that moves a Quant onto it.

    the grid    -1, 0, 1 times any number, or two of the three
    the grain   one step for the matrix
    the step    autobitlinear: any fp32 number. bitlinear: one that is the inverse of an fp32 number
    the zero    none, nor an offset
    the shape   a matrix (out, in), out a multiple of 4: a byte holds four rows
    the input   8 bits a token, max|x| on 127, found at run time; never full precision

Nothing is rounded and nothing is quantized again. `fit` makes the step for bitlinear an inverse, and an input's reach and floor BitNet's.
"""

from __future__ import annotations

from typing import Any

import torch

from ...core.error import FormatError, unknown
from ...core.grain import PerTensor, PerToken
from ...core.grid import Grid, Ternary, Uniform
from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from ...core.scale import AbsMax, AbsMean
from .layout import ROWS

NAME = "bitnet"
FLOOR = 1e-5                                                      # of mean|W| and of max|x|, transformers'
INPUT = Quant(Uniform(8), PerToken(), AbsMax(floor=FLOOR / 127))
TARGETS: dict[str, Quant | None] = {"bitlinear": Quant(Ternary(), PerTensor(), AbsMean(floor=FLOOR, inverse=True)),
                                    "autobitlinear": Quant(Ternary(), PerTensor(), AbsMean(floor=FLOOR))}


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant, for bitlinear with a step that is stored as its inverse, in fp32. Grid, grain, kind of scale, estimator and refit are kept.

    Raises:
        FormatError: what the target cannot hold, with the reason.

    >>> from qatlas.core.scheme import scheme
    >>> fit(scheme("w1.58-tensor").weight, "bitlinear", (64, 512)).scale.inverse
    True
    """
    _known(target)
    moves = target == "bitlinear" and quant.scale.nested is None and not quant.scale.inverse
    moved = quant.but(scale=quant.scale.but(dtype="float32", inverse=True)) if moves else quant
    if (why := why_not(moved, target, shape)) is not None:
        raise FormatError(f"{NAME}:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {why}.\n"
                          f"  nearest scheme for {NAME}:{target}: w1.58a8-tensor; groups and channels of -1, 0, 1 are held by gguf:tq2_0, "
                          "compressed-tensors:w2a16, torchao:w2a16")
    return moved


def fit_input(quant: Quant | None, target: str, weight: Any, shape: tuple[int, ...], module: str) -> Quant | None:
    """The Quant of a layer's input moved onto the target; None is full precision. weight: what `fit` gave, None for full precision. module: the class
    of the layer.

    Raises:
        FormatError: a class that has no place here, or an input that is not quantized as BitNet's are.
    """
    if weight is None and quant is not None:
        raise FormatError(f"{NAME} has no place for a quantized input before a weight in full precision; quantize both, or neither")
    if weight is None:
        return None
    if module != "Linear":
        raise FormatError(f"{NAME} quantizes nn.Linear alone, this layer is a {module}; keep it in full precision: keep_full(...), or "
                          "weight=None for it in --rules")
    if quant is not None and quant.grid == INPUT.grid and type(quant.scale) is AbsMax:
        quant = quant.but(scale=quant.scale.but(reach=None, floor=INPUT.scale.floor))  # type: ignore[call-arg]
    kind_of(weight, quant, target, shape)
    return quant


def kind_of(tensor: Any, entry: Quant | None, target: str, shape: tuple[int, ...] | None = None) -> str:
    """The target, where it holds a layer: its weight (Quant or QTensor) and its input.

    Raises:
        FormatError: where it does not, with the reason.
    """
    if (reason := why_not(tensor, target, shape)) is not None:
        raise FormatError(f"{NAME}:{target} cannot hold this layer: {reason}")
    same = entry is not None and type(entry.scale) is AbsMax and entry.but(
        estimator=INPUT.estimator, scale=entry.scale.but(gradient=INPUT.scale.gradient)) == INPUT
    if not same:
        found = "in full precision" if entry is None else f"quantized by {entry.grid}, {entry.grain}, {entry.scale}"
        raise FormatError(f"{NAME}:{target} cannot hold this layer: its input is {found}, and its reader quantizes every input by {INPUT.grid}, "
                          f"{INPUT.grain}, {INPUT.scale}. Train with the target, and with inputs of 8 bits (w1.58a8-tensor)")
    return target


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a weight, a Quant or a QTensor of `shape` (out, in), or None.

    A Quant is judged by what it says, a QTensor by its values.

    >>> from qatlas.core.scheme import weight
    >>> why_not(weight(1.58), "autobitlinear", (8, 512))
    'PerChannel(axis=0) gives a matrix 8 steps, and there is one here; take PerTensor() (w1.58a8-tensor)'
    """
    _known(target)
    shape = tuple(getattr(tensor, "shape", ()) if shape is None else shape)
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and a layer has one step and one code an element"
    if (size := unit(tensor.grid)) is None:
        return f"{tensor.grid} has other values than -1, 0, 1 and their multiples"
    if len(shape) != 2:
        return f"only matrices (out, in) are layers of this format, this one has shape {shape}"
    if shape[0] % ROWS:
        return f"{shape[0]} rows are no multiple of {ROWS}, and a byte holds {ROWS} rows; keep this layer in full precision"
    return _said(tensor, target, shape, size) if isinstance(tensor, Quant) else _found(tensor, target)


def unit(grid: Grid) -> float | None:
    """c, where all values of a grid are -c, 0 or c; else None.

    >>> unit(Ternary()), unit(Uniform(2)), unit(Uniform(2, narrow=True))
    (1.0, None, 1.0)
    """
    if grid.bits > 2 or getattr(grid, "signed", True) is None:
        return None
    values = grid.values().abs()
    sizes = values[values > 0].unique()
    return float(sizes[0]) if len(sizes) == 1 else None


def step(tensor: QTensor) -> torch.Tensor:
    """What 1 stands for, fp32 (1,): the grid's unit times the first step, rounded as the trained weight is."""
    return (tensor.steps.reshape(-1)[:1] * torch.tensor(unit(tensor.grid))).cpu()


def _said(quant: Quant, target: str, shape: tuple[int, ...], size: float) -> str | None:
    """Of a Quant: where its step and its place come from."""
    count = torch.Size(quant.grain.scale_shape(shape)).numel()
    if count != 1:
        return f"{quant.grain} gives a matrix {count} steps, and there is one here; take PerTensor() (w1.58a8-tensor)"
    if quant.scale.nested is not None:
        return "the step is itself quantized, and this format holds a plain one"
    place = quant.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), quant.grid)
    if place.zero is not None or place.offset is not None:
        return f"{type(quant.scale).__name__} has a zero or an offset, which have no place here; take AbsMean() or AbsMax()"
    if target == "bitlinear" and not (quant.scale.inverse and size.hex().split("p")[0] == "0x1.0000000000000"):
        return "the reader divides by the inverse of the step, and not every step has one; " + (
            "`fit` moves it (inverse=True)" if not quant.scale.inverse else f"nor has {size:g} steps, a value of {quant.grid}: take Ternary()")
    return None


def _found(tensor: QTensor, target: str) -> str | None:
    """Of a QTensor: its numbers."""
    if tensor.offset is not None or (tensor.zero is not None and bool((tensor.zero != 0).any())):
        return "it has a zero point or an offset, which have no place here"
    if isinstance(tensor.scale, QTensor) or not bool((tensor.steps == tensor.steps.reshape(-1)[0]).all()):
        return f"{tensor.grain} gave it several steps, and there is one here; take PerTensor() (w1.58a8-tensor)"
    s = step(tensor)
    if s.dtype != torch.float32 or not bool(torch.isfinite(s).all() & (s != 0).all()):
        return f"its step is {float(s)}, {s.dtype}; it must be a finite fp32 number other than 0"
    if target == "bitlinear" and not torch.equal(1 / (1 / s), s):
        return f"its step {float(s)!r} is the inverse of no fp32 number, and the reader divides by one; train with the target, or take autobitlinear"
    return None


def _known(target: str) -> None:
    if target not in TARGETS:
        raise FormatError(unknown("target", f"{NAME}:{target}", [f"{NAME}:{name}" for name in TARGETS]))
