"""Further: the Quant of a tensor that was quantized elsewhere, so that training can go on from exactly its codes and steps.

    of(q)        the Quant whose quantizer, started from q (`Quantizer.start`), gives q.dequantize() back, bit for bit, for the master q.dequantize()
    Levels       a Quant whose steps are stored in two levels, codes times a coarser step (K blocks of GGUF, NVFP4)

Steps, zeros and offsets learn, by the plain clipped rule; the estimator is `Clip()`. They are rounded in the forward to the type in which they were
stored. Of two levels the coarser learns and the integers below it stay as they were stored,

    s = d c      dd = sum over its c of c ds          m = d' c'     likewise, d' = -dmin of GGUF

since a step that is measured anew from its own values (`Scale.nested`) would not be the stored one: no rule that we know of gives back d and c from
d c alone. A step of zero has no place: it is taken as the smallest number of its type (of two levels: the smallest integer above zero), the codes
below it as zero, which leaves all values as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .error import QuantError
from .estimator import Clip
from .place import Place
from .qtensor import QTensor, straight
from .quantizer import Quant, Quantizer, pack, working
from .scale import AbsMax, Learned, MinMax, Scale
from .stored import rounded


@dataclass(frozen=True)
class Levels(Quant):
    """A Quant whose quantizer keeps the integers of its two-level steps: `scale.nested` and `scale.offset_nested` say their grid, grain and type."""

    def build(self) -> LevelsQuantizer:
        return LevelsQuantizer(self)


def of(q: QTensor) -> Quant:
    """The Quant of a stored tensor.

    >>> from qatlas.core.grid import Uniform; from qatlas.core.grain import PerChannel
    >>> q = QTensor(torch.tensor([[7, 9]], dtype=torch.uint8), torch.tensor([-0.5]), None, None, Uniform(4), PerChannel())
    >>> of(q).build().start(q)(q.dequantize()).tolist(), q.dequantize().tolist()
    ([[0.5, -0.5]], [[0.5, -0.5]])
    """
    first: Scale = MinMax() if q.zero is not None else MinMax("offset") if q.offset is not None else AbsMax()
    changes: dict[str, Any] = {"dtype": q.scale_dtype, "sign": _sign(q.steps)}
    if isinstance(q.scale, QTensor):
        changes["nested"] = _level(q.scale)
    if isinstance(q.offset, QTensor):
        changes["offset_nested"] = _level(q.offset)
    elif q.offset is not None:
        changes["offset_dtype"] = _type(q.offset)
    kind = Levels if isinstance(q.scale, QTensor) or isinstance(q.offset, QTensor) else Quant
    return kind(q.grid, q.grain, Learned(first).but(**changes), Clip())


def _level(q: QTensor) -> Quant:
    if isinstance(q.scale, QTensor) or q.zero is not None or q.offset is not None:
        raise QuantError("steps of three levels, or with a zero of their own, do not train; dequantize the tensor")
    return Quant(q.grid, q.grain, AbsMax(dtype=q.scale_dtype, sign="free"))


def _sign(steps: Tensor) -> str:
    return "positive" if bool((steps > 0).all()) else "free"


def _type(offset: Tensor) -> str:
    """fp16 where it holds every offset: what a block of GGUF has."""
    return "float16" if torch.equal(offset.to(torch.float16).to(offset.dtype), offset) else "float32"


class LevelsQuantizer(Quantizer):
    """The state of a `Levels`: parameters `scale` and `offset` are the coarser steps, buffers `scale_codes` and `offset_codes` the integers."""

    scale_codes: Tensor | None
    offset_codes: Tensor | None

    def __init__(self, quant: Quant) -> None:
        super().__init__(quant)
        self.scale_codes = self.offset_codes = None

    @property
    def computes(self) -> Quant:
        plain = self.quant.scale.but(nested=None, offset_nested=None, dtype="float32", offset_dtype="float32", sign="free")
        return Quant(self.quant.grid, self.quant.grain, plain, self.quant.estimator, self.quant.refit, self.quant.clip)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Quantizer:
        return self.start(self.quant.quantize(x))

    @torch.no_grad()
    def start(self, stored: QTensor) -> Quantizer:
        tops = {}
        for name in ("scale", "offset"):
            part = getattr(stored, name)
            if isinstance(part, QTensor):
                self._codes(name, _above(part) if name == "scale" else part.codes.clone())
                part = part.steps
            tops[name] = part
        return self._hold(Place.of(tops["scale"], stored.zero, tops["offset"], stored.steps.dtype))

    def level(self, name: str) -> Any:
        """The scale or the offset as it will be stored, on the graph: a QTensor, a Tensor, or None."""
        top, codes = getattr(self, name), getattr(self, f"{name}_codes")
        said = self.quant.scale.nested if name == "scale" else self.quant.scale.offset_nested
        if top is None:
            return None
        if said is None or codes is None:
            whole = self.quant.scale.but(nested=None)
            return straight(top, whole.cast if name == "scale" else whole.cast_offset)
        cast = said.scale.cast if name == "scale" else partial(rounded, dtype=said.scale.dtype)       # an offset may be zero, a step may not
        return QTensor(codes, straight(top, cast), None, None, said.grid, said.grain, said.scale.dtype)

    def place(self, view: Tensor) -> Place:
        if not self.ready:
            raise QuantError("a quantizer of two-level steps is used before it has any: start it from a stored tensor, or initialise it")
        found = (part.dequantize() if isinstance(part := self.level(name), QTensor) else part for name in ("scale", "offset"))
        scale, offset = found
        return Place.of(scale, self.zero, offset, view.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        view = self.quant.grain.view(working(x))
        q = pack(view, self.place(view), None if shift is None else self.quant.grain.view(shift), self.computes, tuple(x.shape))
        q.scale, q.offset = self.level("scale"), self.level("offset")
        return q

    def _codes(self, name: str, codes: Tensor) -> None:
        delattr(self, f"{name}_codes") if f"{name}_codes" in self.__dict__ else None
        self.register_buffer(f"{name}_codes", codes)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("scale", "offset"):
            codes = state.get(f"{prefix}{name}_codes")
            if codes is not None and getattr(self, f"{name}_codes") is None:
                self._codes(name, torch.zeros(codes.shape, dtype=torch.uint8, device=codes.device))
        super()._load_from_state_dict(state, prefix, *rest)


def _above(level: QTensor) -> Tensor:
    """The codes of the integers, those of zero moved to the first above zero."""
    values = level.grid.values()
    first = level.grid.encode(values[values > 0][:1]).to(level.codes)
    return torch.where(level.values() == 0, first, level.codes)
