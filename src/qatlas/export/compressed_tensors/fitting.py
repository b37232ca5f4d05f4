"""Which trained numbers a kind of compressed-tensors holds exactly, and the rule that moves a Quant onto it.

    the grid    integers: with a power of two k, all k v are integers within the kind's bits; s v = (s / k) (k v) is the same fp32 number. A grid that
                does not lie around zero (0 ... 15) is moved, its zero with it: v - z does not change. E4M3 and E2M1 hold themselves alone.
    the grain   one step a channel or a group of any size that runs along the inputs; a coarser one repeats its step
    the step    any fp32 number, in the type in which it was trained; FP4 needs powers of two, or E4M3 under a power of two
    the zero    whole and on the grid (integers alone); an offset in values has no place
    the input   full precision where the kind says a16, else one step a token, found at run time, as compressed-tensors finds it

Nothing is rounded and nothing is quantized again. `fit` changes the type of the step, and the reach of an input's step (127.5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError, QuantError, unknown
from ...core.floats import Float
from ...core.grid import Grid
from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from ..integers import integers, sharing
from .kinds import KINDS, MIXED, NESTED, POWER, Kind

NAME = "compressed-tensors"
TARGETS: dict[str, Quant | None] = {name: kind.own for name, kind in KINDS.items()} | {MIXED: None}
NORMAL = 2.0**-126
SCHEMES = {**{f"w{bits}a16": f"w{bits}-g128" for bits in (2, 3, 4, 8)}, "w4a8": "w4a8", "w8a8": "w8a8"}


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant with its step in the type that the target stores: of packed integers fp32 becomes bf16, since vLLM reads it in its compute type; FP4
    takes its own. Grid, grain, kind of scale, estimator and refit are kept.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import weight
    >>> fit(weight(1.58), "w2a16", (64, 512)).scale.dtype
    'bfloat16'
    """
    reason = ""
    for name in _kinds(target):
        moved = _moved(quant, name)
        if (why := why_not(moved, name, shape)) is None:
            return moved
        reason += f"; {name}: {why}" if target == MIXED else f": {why}"
    able = [name for name in KINDS if why_not(_moved(quant, name), name, shape) is None]
    others = ", ".join(f"{NAME}:{name}" for name in able) or "none"
    own = SCHEMES.get(target) or (KINDS[target].own if target in KINDS else "w4-g128")
    raise FormatError(f"{NAME}:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}{reason}.\n"
                      f"  targets that hold these numbers: {others}; nearest scheme for {NAME}:{target}: {own}")


def fit_input(quant: Quant | None, target: str, weight: Any, shape: tuple[int, ...], module: str) -> Quant | None:
    """The Quant of a layer's input moved onto the target; None is full precision. weight: what `fit` gave, None for full precision. module: the class
    of the layer.

    Raises:
        FormatError: a class that has no place in the format, or an input that the target does not quantize, or not so.
    """
    if weight is None and quant is not None:
        raise FormatError(f"{NAME} has no place for a quantized input before a weight in full precision; quantize both, or neither")
    if weight is None:
        return None
    if module != "Linear":
        raise FormatError(f"{NAME} quantizes nn.Linear alone, this layer is a {module}; keep it in full precision: keep_full(...), or "
                          "weight=None for it in --rules")
    for own in (kind.input for kind in _kinds(target).values()):
        quant = quant if quant is None or own is None else _near(quant, own)
    kind_of(weight, quant, target, shape)
    return quant


def kind_of(tensor: Any, entry: Quant | None, target: str, shape: tuple[int, ...] | None = None) -> str:
    """The kind in which a layer is written: its weight (Quant or QTensor) and its input.

    Raises:
        FormatError: none, with the reason.
    """
    kinds = _kinds(target)
    able = {name: kind for name, kind in kinds.items() if target != MIXED or why_not(tensor, name, shape) is None}
    same = [name for name, kind in able.items() if _same(entry, kind.input)]
    if not same:
        raise FormatError(f"{NAME}:{target} cannot hold this layer: {_input(entry, list(able))}")
    if (reason := why_not(tensor, same[0], shape)) is not None:
        raise FormatError(f"{NAME}:{target} cannot hold this layer: {reason}")
    return same[0]


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a weight, a Quant or a QTensor of `shape` (out, in), or None.

    A Quant is judged by what it says, a QTensor by its values.

    >>> from qatlas.core.grid import Uniform
    >>> why_not(TARGETS["w4a16"].but(grid=Uniform(5)), "w4a16", (8, 512))
    'the values of Uniform(bits=5, signed=True, narrow=False) are no integers of 4 bits, nor those over a power of two'
    """
    kinds = _kinds(target)
    shape = tuple(getattr(tensor, "shape", ()) if shape is None else shape)
    if target == MIXED:
        reasons = {name: why_not(tensor, name, shape) for name in kinds}
        return None if None in reasons.values() else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and a layer has one step and one code an element"
    kind = kinds[target]
    reason = _grid(tensor.grid, kind)
    if reason is None and len(shape) != 2:
        reason = f"only matrices (out, in) are layers of this format, this one has shape {shape}"
    return reason or _grain(tensor, shape, kind) or _zero(tensor, kind) or _step(tensor, kind)


def _kinds(target: str) -> dict[str, Kind]:
    if target not in TARGETS:
        raise FormatError(unknown("target", f"{NAME}:{target}", [f"{NAME}:{name}" for name in TARGETS]))
    return KINDS if target == MIXED else {target: KINDS[target]}


def _moved(quant: Quant, target: str) -> Quant:
    kind, scale = _kinds(target)[target], quant.scale
    if kind.own.scale.nested is not None:
        return quant if scale.nested is not None else quant.but(scale=scale.but(nested=NESTED, dtype="float32"))
    if kind.own.scale.dtype == POWER:
        return quant.but(scale=scale.but(dtype=POWER, floor=max(scale.floor or 0.0, NORMAL)))
    narrow = kind.own.scale.dtype == "bfloat16" and scale.dtype == "float32"
    return quant.but(scale=scale.but(dtype="bfloat16")) if narrow else quant


def _grid(grid: Grid, kind: Kind) -> str | None:
    if kind.type == "float":
        return None if grid == kind.own.grid else f"{grid} is not {kind.own.grid}, the one grid of {kind.format}"
    if isinstance(grid, Float) or grid.bits > 8 or integers(grid, kind.bits) is None:
        return f"the values of {grid} are no integers of {kind.bits} bits, nor those over a power of two"
    return None if getattr(grid, "signed", True) is not None else f"{grid} has not settled whether it is signed; weights are, write signed=True"


def _grain(tensor: Any, shape: tuple[int, ...], kind: Kind) -> str | None:
    try:
        size = sharing(tensor.grain, shape)
    except QuantError as error:
        return str(error)
    if isinstance(kind.sizes, int) and (size is None or size % kind.sizes):
        return f"{tensor.grain} does not give each {kind.sizes} inputs one step, as {kind.format} does; take Group({kind.sizes})"
    if kind.sizes == "channel" and size != shape[1]:
        return f"{tensor.grain} gives a row several steps, and this kind has one a channel; take PerChannel()"
    return None if size is not None else f"{tensor.grain} is no group along the inputs; take Group(n) or PerChannel()"


def _zero(tensor: Any, kind: Kind) -> str | None:
    place: Any = tensor
    if isinstance(tensor, Quant):
        place = tensor.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), tensor.grid)
    if place.offset is not None:
        return "a float offset in values has no place here; take a whole zero point, MinMax(), or none, AbsMax()"
    if place.zero is None:
        return None
    if kind.type == "float":
        return f"a zero point has no place in {kind.format}; take a scale without one, such as AbsMax()"
    if isinstance(tensor, QTensor):
        k, m = integers(tensor.grid, kind.bits) or (1, 0)
        z = place.zero * k - m
        if not bool(((z.round() == z) & (z >= -(2 ** (kind.bits - 1))) & (z < 2 ** (kind.bits - 1))).all()):
            return f"some zero points are no integers of {kind.bits} bits"
    return None


def _step(tensor: Any, kind: Kind) -> str | None:
    if isinstance(tensor, Quant):
        nested, dtype = tensor.scale.nested, tensor.scale.dtype
        if kind.own.scale.nested is not None:
            good = nested is not None and nested.grid == Float(4, 3) and nested.scale.dtype == POWER and nested.grain == NESTED.grain
            return None if good else f"its steps must be E4M3 over one power of two, nested={NESTED!r}"
        if nested is not None:
            return "the steps are themselves quantized, and this kind holds plain ones"
        power = kind.own.scale.dtype != POWER or dtype == POWER
        return None if power else f"the step is trained as {dtype}, not as a power of two; `fit` moves it"
    if kind.own.scale.nested is not None:
        return _two_levels(tensor.scale)
    steps = tensor.steps
    if kind.own.scale.dtype == POWER:
        exact = bool(((torch.frexp(steps).mantissa == 0.5) & (steps >= NORMAL)).all())
        return None if exact else "some steps are no powers of two; train with the target"
    k = (integers(tensor.grid, kind.bits) or (1, 0))[0] if kind.type == "int" else 1
    return None if torch.equal((steps.float() / k * k).to(steps.dtype), steps) else "some steps are too small, or too long, for fp32"


def _two_levels(scale: Any) -> str | None:
    if not (isinstance(scale, QTensor) and scale.grid == Float(4, 3) and isinstance(scale.scale, Tensor) and scale.scale.numel() == 1):
        return "its steps are not E4M3 over one fp32 number; train with the target"
    top = scale.steps
    if bool((torch.frexp(top).mantissa != 0.5).any()) or bool((1 / top).isinf().any()):
        return "the step of its steps is no power of two, and the reader, which answers in bf16, would round the products; train with the target"
    return None


def _near(quant: Quant, own: Quant) -> Quant:
    """An input's Quant with the reach of the format, where nothing else differs."""
    plain = quant.grid == own.grid and type(quant.scale) is type(own.scale)
    return quant.but(scale=quant.scale.but(reach=own.scale.reach)) if plain else quant  # type: ignore[attr-defined]


def _same(entry: Quant | None, own: Quant | None) -> bool:
    """Whether an input is quantized as the format does it; how gradients pass is not in the file."""
    if entry is None or own is None:
        return entry is own
    if type(entry.scale) is not type(own.scale):
        return False
    return entry.but(estimator=own.estimator, scale=entry.scale.but(gradient=own.scale.gradient)) == own


def _input(entry: Quant | None, able: list[str]) -> str:
    if not able:
        return "no kind holds its weight"
    wanted = {name: KINDS[name].input for name in able}
    asks = "; ".join(f"{name}: {'full precision' if own is None else f'{own.grid}, {own.grain}, {own.scale}'}" for name, own in wanted.items())
    found = "in full precision" if entry is None else f"quantized by {entry.grid}, {entry.grain}, {entry.scale}"
    return f"its input is {found}, and the file would say otherwise ({asks}). Train with the target, and with inputs that it knows"
