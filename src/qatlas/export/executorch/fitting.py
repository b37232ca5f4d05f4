"""Which trained numbers XNNPACK holds exactly, and the rule that moves a Quant onto it.

XNNPACK has no products of quantized weights with inputs in full precision: a layer's input is quantized too, in 8 bits, with a step and a zero found
at run time.

    the layer   nn.Linear, GPT-2's Conv1D, and nn.Conv2d of one group
    the grid    integers of 4 or 8 bits (convolutions: 8), also after a power of two (export/integers.py); not after a shift, since there is no zero
    the zero    none: weights are symmetric
    the grain   one step a channel, in fp32; matrices of 4 bits also groups of 32, or of a multiple of that, whose steps are bf16
    the step    positive and normal; one that is itself quantized has no place
    the input   Uniform(8), PerToken(), MinMax(): a step and a zero for each token; in front of a convolution PerChannel(0), one for each image

Nothing is rounded and nothing is quantized again. `fit` makes the steps of groups bf16, and gives an input's 8 signed bits the zero that the engine
will give them (AbsMax becomes MinMax).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError, QuantError, unknown
from ...core.grain import Grain, Group, PerChannel, PerTensor, PerToken
from ...core.grid import Uniform
from ...core.quantizer import Quant
from ...core.scale import AbsMax, MinMax
from ..checkpoint import Signal
from ..integers import integers, sharing

NAME = "executorch"
INPUT = Quant(Uniform(8), PerToken(), MinMax())                   # XNNPACK's qdint8
IMAGE = Quant(Uniform(8), PerChannel(0), MinMax())                # the same in front of a convolution: one place for each image
INPUTS = {"Linear": INPUT, "Conv1D": INPUT, "Conv2d": IMAGE}     # Conv1D is GPT-2's linear, another way round
BITS = {"int4": (4, 8), "int8": (8,)}
TARGETS: dict[str, Quant | None] = {"int4": Quant(Uniform(4), Group(32), AbsMax(dtype="bfloat16")), "int8": Quant(Uniform(8), PerChannel(), AbsMax())}
SCHEMES = {"int4": "w4a8-g32", "int8": "w8a8"}
WIDTH = 32                                                        # a group is a multiple of it
NARROW = ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu")          # types whose numbers are bf16
NORMAL = 2.0**-126


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant with the steps of groups made bf16. Grid, grain, kind of scale, estimator and refit are kept.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import scheme
    >>> fit(scheme("w4-g32").weight, "int4", (64, 512)).scale.dtype
    'bfloat16'
    """
    known(target)
    moved = _moved(quant, shape)
    if (why := why_not(moved, target, shape)) is None:
        return moved
    able = ", ".join(f"{NAME}:{name}" for name in TARGETS if why_not(moved, name, shape) is None) or "none"
    raise FormatError(f"{NAME}:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {why}.\n"
                      f"  targets that hold these numbers: {able}; nearest scheme for {NAME}:{target}: {SCHEMES[target]}")


def fit_input(quant: Quant | None, target: str, weight: Any, shape: tuple[int, ...], module: str) -> Quant | None:
    """The Quant of a layer's input moved onto the target; None is full precision. weight: what `fit` gave, None for full precision. module: the class
    of the layer.

    Raises:
        FormatError: a class that has no place here, or an input that XNNPACK does not quantize so.
    """
    known(target)
    if weight is None and quant is None:
        return None
    if weight is None:
        raise FormatError(f"{NAME}:{target} has no place for a quantized input before a weight in full precision; quantize both, or neither")
    if module not in INPUTS:
        raise FormatError(f"{NAME}:{target} quantizes nn.Linear and nn.Conv2d alone, this layer is a {module}; keep it in full precision: "
                          "keep_full(...), or weight=None for it in --rules")
    own = INPUTS[module]
    plain = quant is not None and quant.but(scale=own.scale, estimator=own.estimator) == own and type(quant.scale) in (AbsMax, MinMax)
    moved = quant.but(scale=own.scale) if quant is not None and plain else quant
    if (why := why_not_input(moved, len(shape))) is not None:
        raise FormatError(f"{NAME}:{target} cannot hold this layer: {why}")
    return moved


def why_not_input(entry: Quant | Signal | None, axes: int = 0) -> str | None:
    """Why XNNPACK does not quantize the input of a weight of so many axes like that (0: of any), or None; how gradients pass is not in the file.

    >>> why_not_input(None)
    'its input is in full precision, and XNNPACK multiplies quantized weights with 8-bit inputs alone; take w4a8, or both full'
    """
    quant = entry.quant if isinstance(entry, Signal) else entry
    if quant is None:
        return "its input is in full precision, and XNNPACK multiplies quantized weights with 8-bit inputs alone; take w4a8, or both full"
    owns = (INPUT, IMAGE) if not axes else (INPUT if axes == 2 else IMAGE,)
    same = isinstance(quant.scale, MinMax) and any(quant.but(estimator=own.estimator, scale=quant.scale.but(gradient=own.scale.gradient)) == own
                                                   for own in owns)
    wants = f"each image in front of a convolution; take {IMAGE!r}" if axes == 4 else "each token of a linear layer's input; take w4a8"
    found = f"{quant.grid}, {quant.grain}, {quant.scale}"
    return None if same else f"its input is quantized by {found}, and XNNPACK finds a step and a zero of 8 bits for {wants}"


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a weight, a Quant or a QTensor of `shape` (out, in), or None. A Quant is judged by what it says, a QTensor by its
    values.

    >>> from qatlas.core.scheme import scheme
    >>> why_not(scheme("w8-g32").weight, "int8", (8, 64))
    'Group(size=32) gives a row several steps, which XNNPACK knows of 4 bits alone; take one step a channel, or 4 bits'
    """
    known(target)
    shape = tuple(getattr(tensor, "shape", ()) if shape is None else shape)
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and a layer has one step and one code an element"
    if len(shape) not in (2, 4):
        return f"only matrices (out, in) and the weights of 2-d convolutions have a place here, this one has shape {shape}"
    if getattr(tensor.grid, "signed", True) is None:
        return f"{tensor.grid} has not settled whether it is signed; weights are, write signed=True"
    return _grid(tensor, target, len(shape)) or _zero(tensor) or _grain(tensor, target, shape) or _step(tensor, shape)


def bits(tensor: Any, target: str, axes: int = 2) -> int | None:
    """The fewest bits of the target whose integers are the grid's values, after a power of two; None where there are none. axes: of the weight; a
    convolution takes 8 bits.

    >>> from qatlas.core.scheme import weight
    >>> bits(weight(3), "int4"), bits(weight(8), "int4"), bits(weight(3), "int8")
    (4, 8, 8)
    """
    return next((b for b in (BITS[target] if axes == 2 else (8,)) if tensor.grid.bits <= 8 and (integers(tensor.grid, b) or (0, 1))[1] == 0), None)


def times(tensor: Any) -> int:
    """The power of two that makes the grid's values integers."""
    found = integers(tensor.grid, 8)
    assert found is not None, "why_not has let it through"
    return found[0]


def neighbours(grain: Grain, shape: tuple[int, ...]) -> int | None:
    """How many neighbours along the inputs share a step, all that one output channel has among them; None where that is no one number."""
    if len(shape) > 2 and isinstance(grain, PerTensor | PerChannel):
        return math.prod(shape[1:]) if isinstance(grain, PerTensor) or grain.axis == 0 else None
    return sharing(grain, (shape[0], math.prod(shape[1:])))


def known(target: str) -> None:
    """Raises FormatError for a target that does not exist."""
    if target not in TARGETS:
        raise FormatError(unknown("target", f"{NAME}:{target}", [f"{NAME}:{name}" for name in TARGETS]))


def _moved(quant: Quant, shape: tuple[int, ...]) -> Quant:
    try:
        size = neighbours(quant.grain, shape) if len(shape) == 2 else None
    except QuantError:
        return quant                                              # why_not says it
    narrow = size is not None and size < shape[1] and quant.scale.nested is None and quant.scale.dtype not in NARROW
    return quant.but(scale=quant.scale.but(dtype="bfloat16")) if narrow else quant


def _grid(tensor: Any, target: str, axes: int) -> str | None:
    if bits(tensor, target, axes) is not None:
        return None
    if tensor.grid.bits <= 8 and integers(tensor.grid, BITS[target][-1]) is not None:
        return f"the values of {tensor.grid} do not lie around zero, and XNNPACK has no zero point for weights; take a signed grid"
    return f"the values of {tensor.grid} are no integers of {BITS[target][-1]} bits, nor those over a power of two"


def _zero(tensor: Any) -> str | None:
    place: Any = tensor
    if isinstance(tensor, Quant):
        place = tensor.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), tensor.grid)
    none = place.offset is None and (place.zero is None or (not isinstance(tensor, Quant) and not bool(place.zero.any())))
    return None if none else "a zero point or an offset has no place in XNNPACK's weights; take a scale without one, such as AbsMax()"


def _grain(tensor: Any, target: str, shape: tuple[int, ...]) -> str | None:
    try:
        size = neighbours(tensor.grain, shape)
    except QuantError as error:
        return str(error)
    if size is None:
        return f"{tensor.grain} is no group along the inputs; take Group(n) or PerChannel()"
    if size == math.prod(shape[1:]):
        return None
    if len(shape) == 4:
        return f"{tensor.grain} gives an output channel several steps, and XNNPACK's convolutions have one a channel; take PerChannel()"
    if bits(tensor, target) != 4:
        return f"{tensor.grain} gives a row several steps, which XNNPACK knows of 4 bits alone; take one step a channel, or 4 bits"
    return None if size % WIDTH == 0 else f"groups of {size} are no multiple of {WIDTH}, as XNNPACK wants them; take Group({WIDTH})"


def _step(tensor: Any, shape: tuple[int, ...]) -> str | None:
    grouped = (neighbours(tensor.grain, shape) or 0) < math.prod(shape[1:])
    if isinstance(tensor, Quant):
        if tensor.scale.nested is not None:
            return "the steps are themselves quantized, and XNNPACK holds plain ones"
        if tensor.scale.sign == "free":
            return "its steps may be negative, and XNNPACK's are positive; take sign='positive' or 'abs'"
        wide = grouped and tensor.scale.dtype not in NARROW
        return f"the steps of groups are bf16, these are trained as {tensor.scale.dtype}; `fit` moves them" if wide else None
    k = (integers(tensor.grid, 8) or (1, 0))[0]
    steps = tensor.steps.float() / k
    if not bool((torch.isfinite(steps) & (steps >= NORMAL)).all()):
        return "some steps are no positive normal fp32 numbers"
    if grouped and not torch.equal(_bf16(steps), steps):
        return "the steps of groups are bf16, and some of these are not; train with the target"
    return None


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()
