"""Which Quants a GGUF block holds exactly, and the rule that moves a Quant onto it.

hold.py judges a trained tensor by its values. Here a Quant is judged before anything is trained, by what it says, so that whatever it gives will fit:
the same four questions (grid, zero, grain, step), answered for all numbers that it may produce. `fit` moves the *types* of the scale, nothing else:

    step          fp16 (MXFP4: E8M0), with a floor where halves of it must be fp16 numbers too
    K blocks      two levels, integers of the block times one fp16 step (`Scale.nested`), where the grain is finer than a block; else one level.
                  Where the offset is an odd multiple of the step (half-integers: 1.5 d) that fp16 step has the 8 bits of bf16
    offset        fp16 (Q4_1, Q5_1), or two levels as the step (`offset_nested`: Q2_K, Q4_K, Q5_K)

A target names the type of the layers in the model's blocks. Embeddings and head (`body=False`) take it too if it holds them, else the smallest type
that does without another kind of step than fp16, else F32. `f32` takes all that a QTensor can say, as plain values; `f16` and `bf16` the grids whose
values are 0 and powers of two.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core.codebook import IQ4_NL
from ...core.error import FormatError, QuantError, unknown
from ...core.floats import Float
from ...core.grain import Grain, Group
from ...core.grid import HalfStep, Ternary, Uniform
from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from ...core.scale import AbsMax, AbsMean, MinMax
from .hold import NO_OFFSET, TWO_LEVELS, ends, hold, images, no_image, odd, spread, straddles
from .layout import LAYOUTS, Layout


def _two(bits: int, signed: bool, subs: int, dtype: str = "float16") -> Quant:
    """The Quant of the steps of a K block."""
    return Quant(Uniform(bits, signed), Group(subs), AbsMax(dtype=dtype, floor=NORMAL if dtype == "bfloat16" else None))


NORMAL = 2.0**-14                                                 # from here up, halving a fp16 number is exact
PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
TARGETS: dict[str, Quant | None] = {
    **dict.fromkeys(PLAIN),
    "q8_0": Quant(Uniform(8), Group(32), AbsMax(dtype="float16")),
    "q4_0": Quant(Uniform(4), Group(32), AbsMax(dtype="float16")),
    "iq4_nl": Quant(IQ4_NL, Group(32), AbsMax(dtype="float16")),
    "q4_1": Quant(Uniform(4, False), Group(32), MinMax("offset", dtype="float16", offset_dtype="float16")),
    "q5_0": Quant(Uniform(5), Group(32), AbsMax(dtype="float16")),
    "q5_1": Quant(Uniform(5, False), Group(32), MinMax("offset", dtype="float16", offset_dtype="float16")),
    "tq1_0": Quant(Ternary(), Group(256), AbsMean(dtype="float16")),
    "tq2_0": Quant(Ternary(), Group(256), AbsMean(dtype="float16")),
    "q2_k": Quant(HalfStep(2), Group(16), AbsMean(nested=_two(4, False, 16, "bfloat16"))),
    "q3_k": Quant(Uniform(3), Group(16), AbsMax(nested=_two(6, True, 16))),
    "q4_k": Quant(Uniform(4, False), Group(32), MinMax("offset", nested=_two(6, False, 8), offset_nested=_two(6, False, 8))),
    "q5_k": Quant(Uniform(5, False), Group(32), MinMax("offset", nested=_two(6, False, 8), offset_nested=_two(6, False, 8))),
    "q6_k": Quant(Uniform(6), Group(16), AbsMax(nested=_two(8, True, 16))),
    "mxfp4": Quant(Float(2, 1), Group(32), AbsMax(dtype="float8_e8m0fnu")),
}
SCHEMES = {"f32": "no quantization", "f16": "w1 or w1.58", "bf16": "w1 or w1.58", "q8_0": "w8-g32", "q4_0": "w4-g32", "q4_1": "w4-g32",
           "iq4_nl": "none; write Quant(IQ4_NL, Group(32)) of core.codebook in a rule",
           "q5_0": "w5-g32", "q5_1": "w5-g32", "tq1_0": "w1.58-g256", "tq2_0": "w1.58-g256", "q2_k": "w2-g16", "q3_k": "w3-g16", "q4_k": "w4-g32",
           "q5_k": "w5-g32", "q6_k": "w6-g16", "mxfp4": "w3-g32"}


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant with the types of its scale moved onto the target; grid, grain, kind of scale, estimator and refit are kept.

    body: False for what lies outside of the model's blocks, which may take another type than the target's.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import weight
    >>> fit(weight(1.58), "tq2_0", (64, 512)).scale.dtype
    'float16'
    """
    moved = _moved(quant, target, shape)
    reason = moved if isinstance(moved, str) else why_not(moved, target, shape)
    if reason is None:
        return moved  # type: ignore[return-value]
    others = {name: found for name in TARGETS if name != target and isinstance(found := _moved(quant, name, shape), Quant)}
    if not body:
        return others[next((name for name in LAYOUTS if name in others and _mild(quant, others[name])), "f32")]
    raise FormatError(f"gguf:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {reason}.\n"
                      f"  targets that hold these numbers: {', '.join(f'gguf:{name}' for name in others) or 'none'}; "
                      f"nearest scheme for gguf:{target}: {SCHEMES[target]}")


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a Quant or a QTensor of `shape` (out, in), or None.

    A Quant is judged by what it says, a QTensor by its values: a QTensor with an fp32 step fits if fp16 happens to hold the step.

    >>> why_not(TARGETS["tq2_0"].but(grain=Group(64)), "tq2_0", (8, 512))
    'Group(size=64) gives neighbours within a block of 256 different steps; take a group that is a multiple of 256, or one step a channel'
    """
    shape = tuple(tensor.shape if shape is None else shape)
    if isinstance(tensor, Quant):
        moved = _moved(tensor, target, shape)
        if isinstance(moved, str):
            return moved
        same = all(getattr(moved.scale, name) == getattr(tensor.scale, name) for name in ("dtype", "nested", "offset_dtype", "offset_nested"))
        return None if same else f"the step is trained as {tensor.scale.dtype} and the block holds {moved.scale.dtype}; `fit` moves it"
    own = held(tensor, target, shape)
    return own if isinstance(own, str) else None


def held(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> QTensor | str | None:
    """A QTensor in the target's own form (hold.py), or the reason why not; None where plain values hold it."""
    _known(target)
    shape = tuple(tensor.shape if shape is None else shape)
    if target == "f32":
        return None
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and a block has one step and one code an element"
    if target in PLAIN:
        values = tensor.dequantize()
        bad = values.to(getattr(torch, PLAIN[target])).to(values.dtype) != values
        return f"{int(bad.sum())} of {bad.numel()} values are no {PLAIN[target]} numbers" if bool(bad.any()) else None
    return _matrix(shape, LAYOUTS[target]) or hold(tensor, LAYOUTS[target])


def _mild(quant: Quant, moved: Quant) -> bool:
    """Whether moving leaves the steps as they were, up to their rounding to fp16."""
    kept = moved.scale.nested == quant.scale.nested and moved.scale.offset_nested == quant.scale.offset_nested
    return kept and moved.scale.dtype in ("float16", "float32", quant.scale.dtype)


def _known(target: str) -> None:
    if target not in TARGETS:
        raise FormatError(unknown("target", f"gguf:{target}", [f"gguf:{name}" for name in TARGETS]))


def _matrix(shape: tuple[int, ...], layout: Layout) -> str | None:
    if len(shape) != 2:
        return f"only matrices (out, in) lie in blocks, this one has shape {shape}"
    return f"{shape[1]} inputs are no multiple of {layout.size}, the block of {layout.type}" if shape[1] % layout.size else None


def _moved(quant: Quant, target: str, shape: tuple[int, ...]) -> Quant | str:
    """The Quant that fits, or the reason why none does."""
    _known(target)
    if target == "f32":
        return quant
    if quant.grid.bits > 8 or getattr(quant.grid, "signed", True) is None:
        return no_image(quant.grid, LAYOUTS["q8_0"], False, False)
    if target in PLAIN:
        return _moved_plain(quant, target)
    layout = LAYOUTS[target]
    try:
        span = _matrix(shape, layout) or _span(quant.grain, shape, layout)
    except QuantError as error:
        return str(error)
    if isinstance(span, str):
        return span
    if layout.steps is None and quant.scale.nested is not None:
        return "the steps are themselves quantized, and a block holds a plain fp16 step"
    two = quant.scale.nested is not None or span < layout.size
    image = _image(quant, layout, two)
    if isinstance(image, str):
        return image
    k, shift = image
    return _two_levels(quant, layout, span, shape, k, shift) if two and layout.steps is not None else _one_level(quant, layout, k, shift)


def _moved_plain(quant: Quant, target: str) -> Quant | str:
    """Onto fp16 or bf16 values."""
    kind = _zero(quant)
    values = quant.grid.values().abs()
    values = values[values > 0]
    if kind is not None:
        return NO_OFFSET if kind == "offset" else NO_OFFSET.replace("float offset", "zero point")
    if not bool((torch.frexp(values).mantissa == 0.5).all()):
        bits = {"f16": 11, "bf16": 8}[target]
        return f"a step of {bits} bits times the values of {quant.grid} takes more than the {bits} bits of {PLAIN[target]}"
    if quant.scale.nested is not None:
        return f"the steps are themselves quantized, and may take more bits than {PLAIN[target]} has"
    floor = quant.scale.floor if values.min() >= 1 else max(quant.scale.floor or 0.0, NORMAL / float(values.min()))
    return quant.but(scale=quant.scale.but(dtype=PLAIN[target], floor=floor))


def _span(grain: Grain, shape: tuple[int, ...], layout: Layout) -> int | str:
    """How many inputs share a step, up to a block; or the reason why the steps are too many."""
    groups = grain.scale_shape(shape)
    numbers = torch.arange(math.prod(groups)).reshape(groups)
    if spread(grain, numbers, shape, layout.size) is not None:
        return layout.size
    if layout.steps is None or spread(grain, numbers, shape, layout.size // layout.subs) is None:
        return straddles(grain, layout.size // layout.subs)
    span = shape[1] // groups[-1]
    return f"{layout.size} is no multiple of {span}: {grain} has steps that two blocks of {layout.type} would share" if layout.size % span else span


def _zero(quant: Quant) -> str | None:
    """Whether its scale gives an offset or a zero."""
    place = quant.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), quant.grid)
    return "offset" if place.offset is not None else "zero" if place.zero is not None else None


def _image(quant: Quant, layout: Layout, two: bool) -> tuple[int, float] | str:
    """(k, H) that is exact for whatever the Quant may produce."""
    grid, kind = quant.grid, _zero(quant)
    if kind == "offset" and not layout.shifted:
        return NO_OFFSET
    as_minimum = kind == "zero" and layout.shifted and layout.steps is not None and not two and 0 <= grid.low <= grid.high <= layout.steps.high
    values = grid.values()
    if kind == "zero" and not as_minimum:                         # the zero goes into the codes
        values = (values[:, None] - torch.arange(math.ceil(grid.low), math.floor(grid.high) + 1)).unique()
    found = images(values, layout)
    if kind == "offset" or as_minimum:
        best = next(((k, shift) for k, shift in found if shift == 0), None)
    else:
        most = 1 if layout.steps is None else 7 if two else int(layout.steps.high)      # the bits that fp16 has to spare for the shift
        best = next(((k, shift) for k, shift in found if odd(shift) <= most), None)
    return best or no_image(grid, layout, kind == "zero", kind == "offset")


def _one_level(quant: Quant, layout: Layout, k: int, shift: float) -> Quant:
    """One step of the layout's type for a block."""
    unit = abs(shift) / odd(shift) if shift and layout.steps is not None else 1.0
    need = max(k, 1 / unit) * NORMAL if layout.dtype == "float16" and (k > 1 or unit < 1) else 0.0
    scale = quant.scale.but(dtype=layout.dtype, floor=max(quant.scale.floor or 0.0, need) if need else quant.scale.floor)
    return quant.but(scale=scale.but(offset_dtype="float16") if _zero(quant) == "offset" else scale)


def _two_levels(quant: Quant, layout: Layout, span: int, shape: tuple[int, ...], k: int, shift: float) -> Quant | str:
    """Integers of the layout times one fp16 step for a block; the same for the offset, where there is one."""
    assert layout.steps is not None
    scale, offset = quant.scale, _zero(quant) == "offset"
    dtype = "bfloat16" if odd(shift) > 1 else "float16"
    need = k * NORMAL if k > 1 or dtype == "bfloat16" else None
    own = Quant(layout.steps, Group(layout.size // span), AbsMax())
    inner = scale.nested or own
    second = (scale.offset_nested or own.but(scale=AbsMax(dtype="float16"))) if offset else None
    for level in (inner, second):
        if level is None:
            continue
        if not bool(torch.isin(level.grid.values(), layout.steps.values()).all()) or _zero(level) is not None:
            return f"the steps of the steps are not the integers of {layout.type}, {ends(layout.steps)}"
        groups = quant.grain.scale_shape(shape)
        outer = level.grain.scale_shape(groups)
        numbers = torch.arange(math.prod(outer)).reshape(outer).unsqueeze(-1).expand(level.grain.view(torch.empty(groups, device="meta")).shape)
        if spread(quant.grain, level.grain.back(numbers, groups), shape, layout.size) is None:
            return f"a block of {layout.size} has one fp16 step, and {layout.subs} integers to multiply it with: {TWO_LEVELS}"
    inner = inner.but(scale=inner.scale.but(dtype=dtype, floor=inner.scale.floor if need is None else max(inner.scale.floor or 0.0, need)))
    second = None if second is None else second.but(scale=second.scale.but(dtype="float16"))
    return quant.but(scale=scale.but(dtype="float32", nested=inner, offset_dtype="float32", offset_nested=second))
