"""Which trained numbers torchao's Intx tensors hold exactly, and the rule that moves a Quant onto them.

    the grid    integers of the target's bits, also after a power of two or a move (export/whole.py)
    the grain   one step for any number of neighbours along the inputs; a coarser grain repeats its step
    the step    any fp32 number; one that is itself quantized has no place
    the zero    whole and on the grid; torchao could hold a float there, its kernels take int8. An offset in values has no place
    the input   full precision where the target says a16, else 8 bits a token with a zero point, as torchao finds it

Nothing is rounded and nothing is quantized again. `fit` changes fp32 steps to bf16, and gives a token's 8 signed bits the zero point that torchao
will give them (AbsMax becomes MinMax).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.error import FormatError, QuantError, unknown
from ...core.grain import Group, PerToken
from ...core.grid import Grid, Uniform
from ...core.qtensor import QTensor
from ...core.quantizer import Quant
from ...core.scale import AbsMax, MinMax
from ..integers import integers, sharing

NAME = "torchao"
MIXED = "mixed"
INPUT = Quant(Uniform(8), PerToken(), MinMax())                   # torchao's int8_asym_per_token


@dataclass(frozen=True)
class Kind:
    """bits: of a weight. dynamic: whether inputs are quantized, one step and zero a token. own: the Quant of weights that it would choose itself."""

    bits: int
    dynamic: bool

    @property
    def own(self) -> Quant:
        """torchao's default group and mapping."""
        return Quant(Uniform(self.bits), Group(32), AbsMax(dtype="bfloat16"))

    @property
    def input(self) -> Quant | None:
        """Of inputs, None for full precision."""
        return INPUT if self.dynamic else None


KINDS = {f"w{bits}a{8 if dynamic else 16}": Kind(bits, dynamic) for dynamic in (False, True) for bits in range(1, 9)}
TARGETS: dict[str, Quant | None] = {name: kind.own for name, kind in KINDS.items()} | {MIXED: None}


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant with fp32 steps made bf16. Grid, grain, kind of scale, estimator and refit are kept.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import weight
    >>> fit(weight(1.58), "w2a16", (64, 512)).scale.dtype
    'bfloat16'
    """
    moved = quant.but(scale=quant.scale.but(dtype="bfloat16")) if quant.scale.dtype == "float32" and quant.scale.nested is None else quant
    if (why := why_not(moved, target, shape)) is None:
        return moved
    able = [name for name in KINDS if why_not(moved, name, shape) is None]
    others = ", ".join(f"{NAME}:{name}" for name in able) or "none"
    own = KINDS[target].own if target in KINDS else KINDS["w4a16"].own
    raise FormatError(f"{NAME}:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {why}.\n"
                      f"  targets that hold these numbers: {others}; nearest scheme for {NAME}:{target}: {_scheme(own)}")


def fit_input(quant: Quant | None, target: str, weight: Any, shape: tuple[int, ...], module: str) -> Quant | None:
    """The Quant of a layer's input moved onto the target; None is full precision. weight: what `fit` gave, None for full precision. module: the class
    of the layer.

    Raises:
        FormatError: a class that has no place here, or an input that the target does not quantize, or not so.
    """
    if weight is None and quant is not None:
        raise FormatError(f"{NAME} has no place for a quantized input before a weight in full precision; quantize both, or neither")
    if weight is None:
        return None
    if module != "Linear":
        raise FormatError(f"{NAME} quantizes nn.Linear alone here, this layer is a {module}; keep it in full precision: keep_full(...), or "
                          "weight=None for it in --rules")
    plain = quant is not None and quant.but(scale=INPUT.scale, estimator=INPUT.estimator) == INPUT and type(quant.scale) in (AbsMax, MinMax)
    if quant is not None and plain and any(kind.dynamic for kind in kinds(target).values()):
        quant = quant.but(scale=INPUT.scale)
    kind_of(weight, quant, target, shape)
    return quant


def kind_of(tensor: Any, entry: Quant | None, target: str, shape: tuple[int, ...] | None = None) -> str:
    """The kind in which a layer is written: its weight (Quant or QTensor) and its input.

    Raises:
        FormatError: none, with the reason.
    """
    same = {name: kind for name, kind in kinds(target).items() if _same(entry, kind.input)}
    if not same:
        raise FormatError(f"{NAME}:{target} cannot hold this layer: {_input(entry, target)}")
    reasons = {name: why_not(tensor, name, shape) for name in same}
    found = next((name for name, reason in reasons.items() if reason is None), None)
    if found is None:
        raise FormatError(f"{NAME}:{target} cannot hold this layer: {next(reversed(reasons.values()))}")
    return found


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a weight, a Quant or a QTensor of `shape` (out, in), or None.

    A Quant is judged by what it says, a QTensor by its values.

    >>> from qatlas.core.grid import Uniform
    >>> why_not(TARGETS["w4a16"].but(grid=Uniform(5)), "w4a16", (8, 512))
    'the values of Uniform(bits=5, signed=True, narrow=False) are no integers of 4 bits, nor those over a power of two'
    """
    bits = max(kind.bits for kind in kinds(target).values())      # mixed: the widest takes all that any takes
    shape = tuple(getattr(tensor, "shape", ()) if shape is None else shape)
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and a layer has one step and one code an element"
    reason = _grid(tensor.grid, bits)
    if reason is None and len(shape) != 2:
        reason = f"only matrices (out, in) are layers of this format, this one has shape {shape}"
    return reason or _grain(tensor, shape) or _zero(tensor, bits) or _step(tensor, bits)


def kinds(target: str) -> dict[str, Kind]:
    """The kinds of a target, fewest bits first."""
    if target not in TARGETS:
        raise FormatError(unknown("target", f"{NAME}:{target}", [f"{NAME}:{name}" for name in TARGETS]))
    return KINDS if target == MIXED else {target: KINDS[target]}


def _grid(grid: Grid, bits: int) -> str | None:
    if grid.bits > 8 or (getattr(grid, "signed", True) is not None and integers(grid, bits) is None):
        return f"the values of {grid} are no integers of {bits} bits, nor those over a power of two"
    return None if getattr(grid, "signed", True) is not None else f"{grid} has not settled whether it is signed; weights are, write signed=True"


def _grain(tensor: Any, shape: tuple[int, ...]) -> str | None:
    try:
        size = sharing(tensor.grain, shape)
    except QuantError as error:
        return str(error)
    return None if size is not None else f"{tensor.grain} is no group along the inputs; take Group(n) or PerChannel()"


def _zero(tensor: Any, bits: int) -> str | None:
    place: Any = tensor
    if isinstance(tensor, Quant):
        place = tensor.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), tensor.grid)
    if place.offset is not None:
        return "a float offset in values has no place here; take a whole zero point, MinMax(), or none, AbsMax()"
    if isinstance(tensor, QTensor) and place.zero is not None:
        k, m = integers(tensor.grid, bits) or (1, 0)
        z = place.zero * k - m
        if not bool(((z.round() == z) & (z >= -(2 ** (bits - 1))) & (z < 2 ** (bits - 1))).all()):
            return f"some zero points are no integers of {bits} bits"
    return None


def _step(tensor: Any, bits: int) -> str | None:
    nested = tensor.scale.nested if isinstance(tensor, Quant) else tensor.scale if isinstance(tensor.scale, QTensor) else None
    if nested is not None:
        return "the steps are themselves quantized, and torchao holds plain ones"
    if isinstance(tensor, Quant):
        return None
    k, steps = (integers(tensor.grid, bits) or (1, 0))[0], tensor.steps
    if not bool(torch.isfinite(steps).all()):
        return "some steps are NaN or infinite"
    return None if torch.equal((steps.float() / k * k).to(steps.dtype), steps) else "some steps are too small, or too long, for fp32"


def _same(entry: Quant | None, own: Quant | None) -> bool:
    """Whether an input is quantized as the format does it; how gradients pass is not in the file."""
    if entry is None or own is None:
        return entry is own
    if type(entry.scale) is not type(own.scale):
        return False
    return entry.but(estimator=own.estimator, scale=entry.scale.but(gradient=own.scale.gradient)) == own


def _input(entry: Quant | None, target: str) -> str:
    wanted = {name: kind.input for name, kind in kinds(target).items()}
    asks = dict.fromkeys("full precision" if own is None else f"{own.grid}, {own.grain}, {own.scale}" for own in wanted.values())
    found = "in full precision" if entry is None else f"quantized by {entry.grid}, {entry.grain}, {entry.scale}"
    return f"its input is {found}, and the file would say otherwise ({' or '.join(asks)}). Train with the target, and with inputs that it knows"


def _scheme(own: Quant) -> str:
    return f"w{own.bits}-g32" if own.bits > 1 else repr(own)
