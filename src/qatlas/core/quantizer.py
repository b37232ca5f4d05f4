"""Quant, all that is said about one tensor, and Quantizer, the module that does it. The one formula:

    u = x / s + z          the place of x on the grid, seen through its grain
    v = snap(u)            the nearest allowed value
    y = s (v - z)          what the layer computes with

With `clip`, x is cut to +-clip before anything else, and its gradient is 0 where it lies at the cut or beyond (TernaryBERT's code).

`forward` gives y with gradients, `hard` gives y without, `quantize` gives the QTensor whose `dequantize()` is y bit for bit: all three run the same
lines (estimator.forward), which is why they cannot differ.

One tensor that several layers quantize alike (query, key and value; gate and up) is quantized once: where nothing is kept and nothing saved, the
answer stays on the tensor for as long as the tensor lives, and all are given the same. So it lies in memory once, too, for all their backwards.

A Quantizer that holds state (a learned or a moving scale) is initialised before it is used: from the weight itself, or for activations by
calibration, which observes some batches and then settles. Used before, it raises; it never initialises itself in passing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .error import QuantError
from .estimator import Estimator, Formula, Snap, Ste, bounded, forward, refit, settle, values
from .grain import Grain, PerChannel, PerToken
from .grid import Grid, Uniform
from .noun import Noun
from .place import Place
from .qtensor import QTensor
from .scale import AbsMax, Scale

SAMPLE = 2**20                                                    # elements of one batch that calibration keeps


@dataclass(frozen=True)
class Quant(Noun):
    """All that is said about one tensor.

    refit: decode with the least-squares step of x on v instead of the step that chose v (TWN, binary nets).
    clip: cut x to +-clip first; None cuts nothing.
    plain: of the class; the formula of x alone is all there is. What a subclass moves or chooses besides, no file can say of a signal.
    watches: of the class; its module looks at x and lets it pass (layers/attention.py).

    >>> from qatlas.core.grid import Ternary
    >>> q = Quant(Ternary(), scale=AbsMax())
    >>> q.hard(torch.tensor([[-2.0, 0.5, 1.5]]))
    tensor([[-2.,  0.,  2.]])
    """

    plain: ClassVar[bool] = True
    watches: ClassVar[bool] = False

    grid: Grid
    grain: Grain = field(default=PerChannel())
    scale: Scale = field(default=AbsMax())
    estimator: Estimator = field(default=Ste())
    refit: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise QuantError(f"clip={self.clip}: values are cut to +-clip; give a positive number, or None")

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        return int(self.grid.bits)

    @property
    def label(self) -> str:
        """In a few words."""
        return f"{type(self.grid).__name__} {self.bits}b"

    @property
    def several(self) -> str:
        """What a weight under it is made of, where that is more than codes of one grid: no format has a place for it. Else nothing."""
        return ""

    def build(self) -> Quantizer:
        """The module."""
        return Quantizer(self)

    def measure(self, view: Tensor) -> Place:
        """The place of a view by the scale, after the clip."""
        return self.scale.measure(bounded(view, self.clip), self.grid)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QTensor:
        """Measure and quantize in one go, without state (also for scales that a Quantizer would keep)."""
        view = self.grain.view(working(x))
        return pack(view, self.measure(view), None, self, tuple(x.shape))

    @torch.no_grad()
    def hard(self, x: Tensor) -> Tensor:
        """The values of `quantize`, in the shape and dtype of x."""
        view = self.grain.view(working(x))
        return self.grain.back(values(view, self.measure(view), None, self), x.shape).to(x.dtype)


class Known(NamedTuple):
    """A tensor's fake-quantized values and the place they were computed with."""

    value: Tensor
    place: Place


class Answer(NamedTuple):
    """A tensor's fake-quantized values, by whom, and how often both had been written."""

    value: Tensor
    quant: Quant
    written: int
    answered: int

    def of(self, quant: Quant, x: Tensor) -> bool:
        """Whether it is the answer of `quant` to x as it is now."""
        return quant == self.quant and (x._version, self.value._version) == (self.written, self.answered)


class Quantizer(nn.Module):
    """The state of one Quant: its learned or moving scale, and whether it is ready.

    quant: the value. It may change once, in `settle`, when calibration decides the signedness.
    on: False lets x pass (the self-teacher, comparisons).
    blend: in training mode the answer is x + blend (y - x); 1 is y. Eval mode and `quantize` always say y, which is what will be stored.
    formula: who runs the formula's lines in `forward` and `known`; None, or one of another Quant (bits may be switched), is estimator.py, eager.
    `quantize` always runs those.
    """

    formula: Formula | None = None

    def __init__(self, quant: Quant) -> None:
        super().__init__()
        self.quant, self.on, self.blend = quant, True, 1.0
        if quant.scale.keeps != "nothing" and isinstance(quant.grain, PerToken):
            raise QuantError(f"a {type(quant.scale).__name__} scale cannot serve per token: tokens come and go; write AbsMax(), or PerTensor()")
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None
        self.offset: Tensor | None = None
        self._seen: list[Tensor] | None = None

    @property
    def computes(self) -> Quant:
        """The Quant by which values and gradients are computed from a place; a subclass whose `place` is stored in another way says another."""
        return self.quant

    @property
    def ready(self) -> bool:
        """Whether a forward is possible."""
        if getattr(self.quant.grid, "signed", True) is None:      # no state dict says it: calibration must
            return False
        return self.quant.scale.keeps == "nothing" or self.scale is not None

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Quantizer:
        """Take the start of the scale from x (a weight, or calibration's sample)."""
        view = self.quant.grain.view(working(x))
        if not view.is_meta and not torch.isfinite(view).all():   # without numbers: a model that is only looked at
            raise QuantError(f"a tensor of shape {tuple(x.shape)} holds NaN or infinity; a scale measured on it would spoil the layer")
        return self._hold(self.quant.measure(view))

    @torch.no_grad()
    def start(self, stored: QTensor) -> Quantizer:
        """Take the start of step, zero and offset from a stored tensor, as they are; nothing is measured."""
        return self._hold(Place.of(stored.steps, stored.zero, stored.offsets, stored.steps.dtype))

    def observe(self, on: bool = True) -> None:
        """From now on let x pass and remember a sample of it; `settle` ends this, `observe(False)` ends it without a result."""
        self._seen = [] if on else None

    @property
    def observed(self) -> bool:
        """Whether something was seen since `observe`."""
        return bool(self._seen)

    @torch.no_grad()
    def settle(self, gather: Any = None) -> None:
        """End calibration: decide the signedness, then initialise from what was seen. `gather` maps a sample to that of all ranks."""
        if self._seen is None:
            return
        if not self._seen:
            self._seen = None
            raise QuantError("a quantizer saw no input during calibration: its layer was never called on the calibration batches")
        seen, self._seen = torch.cat(self._seen, -1), None        # (groups, n)
        seen = seen if gather is None else gather(seen)
        if not torch.isfinite(seen).all():
            raise QuantError("calibration met NaN or infinity in an activation")
        if isinstance(self.quant.grid, Uniform) and self.quant.grid.signed is None:
            self.quant = self.quant.but(grid=self.quant.grid.but(signed=bool(seen.min() < 0)))
        if self.quant.scale.keeps != "nothing":
            self._hold(self.quant.measure(seen))

    def place(self, view: Tensor) -> Place:
        """The place of a view: measured, running, or learned."""
        scale = self.quant.scale
        if scale.keeps == "nothing" and self.ready:
            if scale.gradient == "statistic":
                return self.quant.measure(view)
            with torch.no_grad():
                return self.quant.measure(view.detach())
        if not self.ready:
            raise QuantError("a quantizer is used before it is initialised: run calibrate(model, task) before the first step")
        if scale.keeps == "buffer" and self.training and torch.is_grad_enabled():
            self._follow(view.detach())
        return Place.of(self.scale, self.zero, self.offset, view.dtype)

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        """x (any shape) -> y of the same shape and dtype. `shift` moves the place, in steps (an adapter inside the grid).
        `known` is what `known()` gave for the same x: the forward then costs nothing, the gradients are the same."""
        if not self.on:
            return x
        if self._seen is not None:
            self._remember(x)
            return x
        quant = self.computes
        shared = self._shares(x, shift, known)
        if shared and (same := getattr(x, "_quantized", None)) is not None and same.of(quant, x):
            return same.value
        view = quant.grain.view(working(x))
        stateless = known is not None and quant.scale.keeps == "nothing" and quant.scale.gradient != "statistic"
        place = known.place if known is not None and stateless else self.place(view)
        strength = quant.scale.strength(view.shape, x.shape, quant.grid)
        value = None if known is None else quant.grain.view(known.value)
        y = Snap.apply(view, *place, None if shift is None else quant.grain.view(shift), value, quant, strength, self._runs())
        y = torch.lerp(view, y, self.blend) if self.training and self.blend < 1 else y      # dx: (1 - blend) g + blend estimator(g)
        y = quant.grain.back(y, x.shape).to(x.dtype)
        if shared and y is not x:
            x._quantized = Answer(y, quant, x._version, y._version)  # type: ignore[attr-defined]
        return y

    @torch.no_grad()
    def known(self, x: Tensor, shift: Tensor | None = None, into: Tensor | None = None) -> Known:
        """The values of x and their place, for later forwards of the same x. into: memory like x, in which the values then lie."""
        view = self.quant.grain.view(working(x))
        place = self.place(view)
        shift = None if shift is None else self.quant.grain.view(shift)
        there = None if into is None or into.dtype != view.dtype else self.quant.grain.view(into)
        there = there if there is not None and there.data_ptr() == into.data_ptr() and there.is_contiguous() else None  # type: ignore[union-attr]
        formula = self._runs()
        y = values(view, place, shift, self.computes, there) if formula is None else formula.values(view, place, shift, there)
        y = self.quant.grain.back(y, x.shape).to(x.dtype)
        return Known(y if into is None else into if there is not None else into.copy_(y), place)

    @torch.no_grad()
    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        """The codes and scales of x; `.dequantize()` equals `forward(x)` bit for bit in fp32."""
        view = self.quant.grain.view(working(x))
        return pack(view, self.place(view), None if shift is None else self.quant.grain.view(shift), self.computes, tuple(x.shape))

    @torch.no_grad()
    def hard(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """The values of `forward`, without a graph."""
        return self.forward(x, shift)

    def _shares(self, x: Tensor, shift: Tensor | None, known: Known | None) -> bool:
        """Whether the answer may serve other layers: it follows from x and quant alone. What Snap would save x for is left out (x would hold the
        answer, and the answer x), leaves are (a parameter lives on), and so is what runs without a graph, where nothing is kept for a backward."""
        quant = self.quant
        alone = shift is None and known is None and type(self) is Quantizer and not (self.training and self.blend < 1)
        deaf = quant.scale.keeps == "nothing" and quant.scale.gradient != "statistic" and quant.estimator.blind and quant.clip is None
        return alone and deaf and not x.is_leaf and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _runs(self) -> Formula | None:
        if self.formula is None or torch.compiler.is_compiling():  # a compiler that has the whole model takes the lines themselves
            return None
        return self.formula if self.formula.quant == self.computes else None

    def _hold(self, place: Place) -> Quantizer:
        learn = self.quant.scale.keeps == "parameter"
        for name, value in zip(("scale", "zero", "offset"), place, strict=True):
            if value is None or self.quant.scale.keeps == "nothing":
                continue
            value = value.detach().squeeze(-1).float().clone()     # masters are fp32, at least one dimension
            if learn:
                delattr(self, name) if name in self.__dict__ else None
                self.register_parameter(name, nn.Parameter(value))
            else:
                delattr(self, name) if name in self.__dict__ else None
                self.register_buffer(name, value)
        return self

    def _follow(self, view: Tensor) -> None:
        now, keep = self.quant.measure(view), self.quant.scale.momentum  # type: ignore[attr-defined]
        for state, value in zip((self.scale, self.zero, self.offset), now, strict=True):
            if state is not None and value is not None:
                state.mul_(keep).add_(value.squeeze(-1), alpha=1 - keep)

    def _remember(self, x: Tensor) -> None:
        view = self.quant.grain.view(working(x.detach()))
        view = view.reshape(-1, view.shape[-1]) if not isinstance(self.quant.grain, PerToken) else view.reshape(1, -1)
        step = -(-view.numel() // SAMPLE)
        parts = [view] if step == 1 else [view[:, ::step], view.amin(1, keepdim=True), view.amax(1, keepdim=True)]
        assert self._seen is not None
        self._seen.append(torch.cat(parts, -1).cpu())

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = [state.get(prefix + name) for name in ("scale", "zero", "offset")]
        if self.scale is None and found[0] is not None:           # a checkpoint of a calibrated model: take its shapes
            self._hold(Place.of(found[0], found[1], found[2], torch.float32))
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        q = self.quant
        return f"{q.grid}, {q.grain}, {type(q.scale).__name__}, {type(q.estimator).__name__}" + ("" if self.ready else ", not calibrated")


def working(x: Tensor) -> Tensor:
    """The type in which places are computed: fp32 at least (bf16 near a tie flips codes)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def pack(view: Tensor, place: Place, shift: Tensor | None, quant: Quant, shape: tuple[int, ...]) -> QTensor:
    """A measured view -> QTensor."""
    raw = place
    _, v, place = forward(view, place, shift, quant)
    codes = quant.grain.back(quant.grid.encode(v), shape).contiguous()
    scale: Any = place.s.squeeze(-1)
    if quant.scale.nested is not None:
        scale = quant.scale.nest(refit(bounded(view, quant.clip), v, settle(raw._replace(zero=place.zero), quant)) if quant.refit else raw.s)
    offset: Any
    zero, offset = (None if t is None else t.squeeze(-1).expand(view.shape[:-1]).contiguous() for t in place[1:])
    if raw.offset is not None and quant.scale.offset_nested is not None:
        offset = quant.scale.nest_offset(raw.offset)
    return QTensor(codes, scale, zero, offset, quant.grid, quant.grain, quant.scale.dtype)
