"""Which trained numbers a GGUF block holds exactly, and the rule that moves a Quant onto it.

A block stands for d * q: one fp16 step d for 32 (or 256) neighbours along the input axis, q an integer of the layout. Three questions decide:

1. The grid. Its values v need not be integers: with a power of two k such that all k v are integers of the layout, s v = (s / k) (k v), and both
sides
   are the same fp32 number, since a fp16 step times an integer of 8 bits is exact. So the grids -1.5 -0.5 0.5 1.5 and E2M1 go into Q4_0 and Q8_0
too. 2. The grain. A coarser one only repeats its step block after block, which costs nothing more than the format takes anyway: one scale a
tensor, a channel
   or 64 inputs all fit blocks of 32. A finer one, or one that straddles a block's edge, does not.
3. The step. Its value must be one that fp16 holds, and s / k too; a step that would have to be rounded here was not the one that was trained with.

A zero point has no place in a symmetric block and is refused, as is an offset. Nothing is rounded, and nothing is quantized again. `f32` takes all
that a QTensor can say, as plain values; `f16` the grids whose values are 0 and powers of two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError, QuantError, unknown
from ...core.grain import Grain, Group
from ...core.grid import Grid, Ternary, Uniform
from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from ...core.scale import AbsMax, AbsMean
from .layout import LAYOUTS, Layout

TARGETS: dict[str, Quant | None] = {
    "f32": None,
    "f16": None,
    "q8_0": Quant(Uniform(8), Group(32), AbsMax(dtype="float16")),
    "q4_0": Quant(Uniform(4), Group(32), AbsMax(dtype="float16")),
    "tq2_0": Quant(Ternary(), Group(256), AbsMean(dtype="float16")),
}
SCHEMES = {"f32": "no quantization", "f16": "w1 or w1.58", "q8_0": "w8-g32", "q4_0": "w4-g32", "tq2_0": "w1.58-g256"}
TIMES = tuple(2**i for i in range(8))
NORMAL = 2.0**-14                                                 # from here up, halving a fp16 number is exact


def fit(quant: Quant, target: str, shape: tuple[int, ...]) -> Quant:
    """The Quant with its step in fp16 and its floor where the target needs it; grid, grain, kind of scale, estimator and refit are kept.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import weight
    >>> fit(weight(1.58), "tq2_0", (64, 512)).scale.dtype
    'float16'
    """
    moved = _moved(quant, target)
    reason = why_not(moved, target, shape)
    if reason is None:
        return moved
    able = [name for name in TARGETS if name != target and why_not(_moved(quant, name), name, shape) is None]
    raise FormatError(f"gguf:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {reason}.\n"
                      f"  targets that hold these numbers: {', '.join(f'gguf:{name}' for name in able) or 'none'}; "
                      f"nearest scheme for gguf:{target}: {SCHEMES[target]}")


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a Quant or a QTensor of `shape` (out, in), or None.

    A Quant is judged by what it says, a QTensor by its values: a QTensor with an fp32 step fits if fp16 happens to hold the step.

    >>> why_not(TARGETS["tq2_0"].but(grain=Group(64)), "tq2_0", (8, 512))
    'Group(size=64) gives neighbours within a block of 256 different steps; take a group that is a multiple of 256, or one step a channel'
    """
    if target not in TARGETS:
        raise FormatError(unknown("target", f"gguf:{target}", [f"gguf:{name}" for name in TARGETS]))
    shape = tuple(tensor.shape if shape is None else shape)
    if target == "f32":
        return None
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and a block has one step and one code an element"
    reason = _grid(tensor.grid, target) or _zero(tensor)
    if target == "f16":
        return reason or _step(tensor, 1)
    layout = LAYOUTS[target]
    if reason is None and len(shape) != 2:
        reason = f"only matrices (out, in) lie in blocks, this one has shape {shape}"
    if reason is None and shape[1] % layout.size:
        reason = f"{shape[1]} inputs are no multiple of {layout.size}, the block of {layout.type}"
    return reason or _grain(tensor, shape, layout) or _step(tensor, times(tensor.grid, layout) or 1)


def times(grid: Grid, layout: Layout) -> int | None:
    """The power of two k for which all k v are integers of the layout; None where there is none.

    >>> times(Uniform(3), LAYOUTS["q4_0"]), times(Uniform(5), LAYOUTS["q4_0"])
    (1, None)
    """
    values = grid.values()
    for k in TIMES:
        v = values * k
        if bool((v.round() == v).all()) and v.min() >= layout.low and v.max() <= layout.high:
            return k
    return None


def block_steps(grain: Grain, steps: Tensor, shape: tuple[int, ...], size: int) -> Tensor | None:
    """One step for each block of `size` inputs: (the grain's) -> (out, in / size), or None where a block would need two."""
    view = grain.view(torch.empty(shape, device="meta")).shape
    each = grain.back(steps.unsqueeze(-1).expand(view), shape).unflatten(-1, (-1, size))       # (out, blocks, size)
    return each[..., 0] if bool((each == each[..., :1]).all()) else None


def _moved(quant: Quant, target: str) -> Quant:
    if target not in TARGETS:
        raise FormatError(unknown("target", f"gguf:{target}", [f"gguf:{name}" for name in TARGETS]))
    if target == "f32":
        return quant
    k = times(quant.grid, LAYOUTS[target]) if target in LAYOUTS and quant.bits <= 8 else 1
    floor = quant.scale.floor if k in (None, 1) else max(quant.scale.floor or 0.0, k * NORMAL)
    return quant.but(scale=quant.scale.but(dtype="float16", floor=floor))


def _grid(grid: Grid, target: str) -> str | None:
    if grid.bits > 8:
        return f"{grid} takes {grid.bits} bits, and no block of ours takes more than 8"
    if getattr(grid, "signed", True) is None:
        return f"{grid} has not settled whether it is signed; weights are, write signed=True"
    if target == "f16":
        values = grid.values().abs()
        exact = bool(((values == 0) | (torch.frexp(values).mantissa == 0.5)).all())
        return None if exact else f"a step of 11 bits times the values of {grid} takes more than the 11 bits of fp16"
    layout = LAYOUTS[target]
    if times(grid, layout) is None:
        return f"the values of {grid} are not the integers {layout.low} .. {layout.high} of {layout.type}, nor those over a power of two"
    return None


def _zero(tensor: Any) -> str | None:
    place: Any = tensor
    if isinstance(tensor, Quant):
        place = tensor.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), tensor.grid)
    if place.offset is not None:
        return "a float offset has no place in a symmetric block; take a scale without one, such as AbsMax()"
    if place.zero is not None:
        return "a zero point has no place in a symmetric block; take a scale without one, such as AbsMax()"
    return None


def _grain(tensor: Any, shape: tuple[int, ...], layout: Layout) -> str | None:
    try:
        groups = tensor.grain.scale_shape(shape)                  # a Quant has no steps yet: number its groups instead
        steps = tensor.steps if isinstance(tensor, QTensor) else torch.arange(math.prod(groups)).reshape(groups)
        if block_steps(tensor.grain, steps, shape, layout.size) is not None:
            return None
    except QuantError as error:
        return str(error)
    return (f"{tensor.grain} gives neighbours within a block of {layout.size} different steps; "
            f"take a group that is a multiple of {layout.size}, or one step a channel")


def _step(tensor: Any, k: int) -> str | None:
    if not isinstance(tensor, QTensor):
        if tensor.scale.nested is not None:
            return "the steps are themselves quantized, and a block holds a plain fp16 step"
        return None if tensor.scale.dtype == "float16" else f"the step is trained as {tensor.scale.dtype} and the block holds fp16; `fit` moves it"
    steps = tensor.steps / k
    bad = steps.half().to(steps.dtype) != steps
    if not bool(bad.any()):
        return None
    return (f"{int(bad.sum())} of {bad.numel()} steps are no fp16 numbers (the first: {float(tensor.steps[bad][0])!r}); "
            "train with the target, or round the steps to fp16 and take the codes anew before exporting")
