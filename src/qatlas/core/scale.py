"""Scale: how long a step is, where it comes from, and what gradient it hears.

A scale measures a view (..., n) of a tensor and answers a `Place`: the step s (..., 1) and, for asymmetric grids, a zero z in codes or an offset m in
values. What it measures is its class:

    AbsMax       max|x| lands on the end of the grid (or on `reach`: 127.5 is compressed-tensors')
    MinMax       the range of x, zero included, over the whole grid, with an integer zero point or a float offset
    AbsMean      times * mean|x|; BitNet with times=1, TWN with refit, LSQ's start with times=2 and `per_root`: 2 mean|x| / sqrt(Qp)
    Rms          times * sqrt(mean x^2)
    Percentile   the q-quantile of |x| lands on the end of the grid
    MseSearch    the shrink of another scale with the least squared error
    Moving       a running average of another scale; a buffer, for static activations
    Learned      a parameter, started by another scale

Each declares its *gradient*: "none" (recomputed and detached: BitNet, QuEST), "statistic" (flows on into x: AECCT), "clipped"
(LSQ's: v - u inside the grid, the end of the grid outside, times `factor`) or "value" (v everywhere, the plain derivative of s v with v held: LR-QAT,
and one-bit weights of BiT and ParetoQ). `slope` is the rule; PACT and others override it. What counts as inside has the two conventions that the
literature has: `margin` 0 ends at the last level (LSQ, clip before round), 0.5 where rounding clips (torch's learnable fake quantization,
EfficientQAT, LR-QAT: round before clip).

And each declares the *type* in which the artefact will store it. `cast` rounds the step to that type in the forward pass, masters stay fp32, so codes
are always taken from the step that will be stored. Its floor is the smallest positive number of that type (1e-8 is 0 in fp16), its sign policy says
what a step that training drove below zero means. A `nested` Quant makes the scales themselves quantized (Q4_K, NVFP4). An offset has a type of its
own (Q4_1 stores it as fp16), or a Quant of its own: formats that quantize it subtract a minimum, so `offset_nested` is a Quant for minus the offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .error import QuantError
from .grid import Grid
from .noun import Noun
from .place import Place, decode, locate
from .stored import SMALLEST, lifted, rounded

if TYPE_CHECKING:
    from .qtensor import QTensor
    from .quantizer import Quant


@dataclass(frozen=True)
class Scale(Noun):
    """The interface and what all scales share.

    dtype: the type in which the scale is stored: float32, float16, bfloat16, float8_e4m3fn, float8_e8m0fnu.
    floor: the smallest step; None takes the smallest positive number of dtype.
    sign: "positive" lifts a step below the floor to the floor; "abs" mirrors it; "free" keeps it (GGUF's d may be negative).
    gradient: "none", "statistic", "clipped" or "value".
    margin: how many steps beyond the grid's reach still count as inside for the gradients of step, zero and offset; see `Clip` for that of x.
    factor: what the scale's gradient is multiplied with: a number, or "lsq" = 1 / sqrt(elements * Qp).
    over: whose elements "lsq" counts: "scale" (those that share it), "tensor" (all; ParetoQ) or "token" (the features of one token).
    nested: a Quant for the scales themselves, grouped along their last axis.
    offset_dtype: the type in which an offset is stored. offset_nested: a Quant for minus the offsets, grouped as `nested`.
    inverse: 1 / s is stored, in fp32, and readers divide by it (BitNet): s is rounded to 1 / (1 / s), which one in six fp32 numbers is not.
    """

    dtype: str = field(default="float32", kw_only=True)
    floor: float | None = field(default=None, kw_only=True)
    sign: str = field(default="positive", kw_only=True)
    gradient: str = field(default="none", kw_only=True)
    margin: float = field(default=0.0, kw_only=True)
    factor: str | float = field(default=1.0, kw_only=True)
    over: str = field(default="scale", kw_only=True)
    nested: Quant | None = field(default=None, kw_only=True)
    offset_dtype: str = field(default="float32", kw_only=True)
    offset_nested: Quant | None = field(default=None, kw_only=True)
    inverse: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, known in (("dtype", SMALLEST), ("offset_dtype", SMALLEST), ("sign", ("positive", "abs", "free")),
                            ("gradient", ("none", "statistic", "clipped", "value")), ("over", ("scale", "tensor", "token"))):
            if getattr(self, name) not in known:
                raise QuantError(f"{type(self).__name__}({name}={getattr(self, name)!r}): {name} is one of {', '.join(known)}")
        if self.inverse and (self.dtype != "float32" or self.nested is not None):
            raise QuantError(f"{type(self).__name__}(inverse=True): the inverse of a step is stored in fp32, not as {self.nested or self.dtype}")

    @property
    def keeps(self) -> str:
        """What a Quantizer holds for it: "nothing", a "buffer" or a "parameter"."""
        return "nothing"

    def measure(self, x: Tensor, grid: Grid) -> Place:
        """(..., n) -> Place of (..., 1), not yet cast."""
        raise NotImplementedError

    def cast(self, s: Tensor) -> Tensor:
        """The step as it will be stored, in the type of s: sign policy, floor, nested quantization, rounding to `dtype`."""
        s = self._signed(s)
        if self.nested is not None:
            return self.nest(s).dequantize().to(s.dtype).unsqueeze(-1)
        s = 1 / (1 / s) if self.inverse else s
        if self.dtype == "float32":
            return s
        return rounded(s, self.dtype)

    def cast_offset(self, m: Tensor) -> Tensor:
        """The offset as it will be stored, in the type of m."""
        if self.offset_nested is not None:
            return self.nest_offset(m).dequantize().to(m.dtype).unsqueeze(-1)
        return m if self.offset_dtype == "float32" else rounded(m, self.offset_dtype)

    def nest(self, s: Tensor) -> QTensor:
        """The steps as a quantized tensor, by the Quant `nested`. A step that would become zero takes the smallest value above zero instead: a place
        has no meaning without a step."""
        assert self.nested is not None
        stored = self.nested.quantize(self._signed(s).squeeze(-1))
        values = self.nested.grid.values().to(stored.codes.device)
        first = self.nested.grid.encode(values[values > 0][:1])
        stored.codes = torch.where(stored.dequantize() == 0, first, stored.codes)
        return stored

    def nest_offset(self, m: Tensor) -> QTensor:
        """The offsets as a quantized tensor: minus the offsets by the Quant `offset_nested`, its steps then negated."""
        assert self.offset_nested is not None
        stored = self.offset_nested.quantize(-m.squeeze(-1))
        assert isinstance(stored.scale, Tensor)                   # two levels, not three
        stored.scale = -stored.scale
        return stored

    def _signed(self, s: Tensor) -> Tensor:
        floor = self.smallest
        if self.sign == "abs":
            s = s.abs()
        return s.clamp(min=floor) if self.sign != "free" else torch.where(s.abs() < floor, floor, s).to(s.dtype)

    @property
    def smallest(self) -> float:
        """The floor in force: of the stored type, so that rounding to it does not fall below."""
        return SMALLEST[self.dtype] if self.floor is None else lifted(max(self.floor, SMALLEST[self.dtype]), self.dtype)

    def slope(self, u: Tensor, v: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
        """dy/ds, element by element: v - u inside, the end of the grid (minus the zero) outside. Source: LSQ, arXiv 1902.08153."""
        end = v if zero is None else v - zero
        if self.gradient == "value":
            return end
        if zero is None:
            return v - grid.passes(u, u, self.margin)
        return grid.passes(v - u, u, self.margin) + (end - grid.passes(end, u, self.margin))    # of two summands one is 0: exact

    def strength(self, view: torch.Size, shape: torch.Size | tuple[int, ...], grid: Grid) -> float:
        """The gradient factor for a view of a tensor of `shape`."""
        if not isinstance(self.factor, str):
            return float(self.factor)
        n = {"scale": view[-1], "tensor": math.prod(shape), "token": shape[-1]}[self.over]
        return 1 / math.sqrt(max(n, 1) * grid.top)


@dataclass(frozen=True)
class AbsMax(Scale):
    """s = max|x| / reach; reach defaults to the grid's high end.

    >>> from qatlas.core.grid import Uniform
    >>> AbsMax().measure(torch.tensor([[-14.0, 7.0]]), Uniform(4)).s
    tensor([[2.]])
    """

    reach: float | None = None

    def measure(self, x: Tensor, grid: Grid) -> Place:
        return Place(x.abs().amax(-1, keepdim=True) / (_end(grid) if self.reach is None else self.reach))


@dataclass(frozen=True)
class MinMax(Scale):
    """s = (max - min) / (high - low), the range widened to hold zero. zero="integer": z = low - round(min / s), clipped to the grid;
    zero="offset": m = min - s low, a float in values (only a few formats hold it)."""

    zero: str = "integer"

    def measure(self, x: Tensor, grid: Grid) -> Place:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if self.zero == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
        s = ((high - low) / (grid.high - grid.low)).clamp(min=self.smallest)
        if self.zero == "integer":
            return Place(s, zero=(grid.low - (low / s).round()).clamp(grid.low, grid.high))
        return Place(s, offset=low - s * grid.low)


@dataclass(frozen=True)
class AbsMean(Scale):
    """s = times * mean|x|, divided by sqrt(Qp) with per_root (LSQ's start)."""

    times: float = 1.0
    per_root: bool = False

    def measure(self, x: Tensor, grid: Grid) -> Place:
        s = self.times * x.abs().mean(-1, keepdim=True)
        return Place(s / math.sqrt(grid.top) if self.per_root else s)


@dataclass(frozen=True)
class Rms(Scale):
    """s = times * sqrt(mean x^2)."""

    times: float = 1.0

    def measure(self, x: Tensor, grid: Grid) -> Place:
        square = x.square().mean(-1, keepdim=True)
        some = square > 0                                         # the slope of the root at zero is infinite; a row of zeros hears nothing
        return Place(self.times * torch.where(some, square, 1.0).sqrt() * some)


@dataclass(frozen=True)
class Percentile(Scale):
    """The q-quantile of |x| (linear interpolation, as torch.quantile, of any size) lands on the grid's high end."""

    q: float = 0.999

    def measure(self, x: Tensor, grid: Grid) -> Place:
        place = self.q * (x.shape[-1] - 1)
        below = math.floor(place)
        order = x.abs().sort(-1).values
        low, high = order[..., below : below + 1], order[..., min(below + 1, x.shape[-1] - 1)][..., None]
        return Place(torch.lerp(low, high, place - below) / _end(grid))


@dataclass(frozen=True)
class MseSearch(Scale):
    """The shrink of `start` with the least mean |error|^power: start * (1 - i / steps * depth), i = 0 .. steps - 1."""

    start: Scale = AbsMax()
    steps: int = 80
    depth: float = 0.8
    power: float = 2.0

    def measure(self, x: Tensor, grid: Grid) -> Place:
        with torch.no_grad():
            first = self.start.measure(x, grid)
            best, least = first, torch.full_like(first.s, torch.inf)
            for i in range(self.steps):
                shrink = 1 - i / self.steps * self.depth
                s = self.cast(first.s * shrink)
                trial = Place(s, first.zero, None if first.offset is None else first.offset * shrink)
                y = decode(grid.snap(locate(x, trial)), trial)
                error = (y - x).abs().pow(self.power).mean(-1, keepdim=True)
                better = error < least
                least = torch.where(better, error, least)
                best = Place(*(new if new is None else torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))  # type: ignore
        return best


@dataclass(frozen=True)
class Moving(Scale):
    """A running average of `start` over training batches: s <- momentum s + (1 - momentum) start(x). Frozen in eval. A buffer of the Quantizer."""

    start: Scale = AbsMax()
    momentum: float = 0.99

    @property
    def keeps(self) -> str:
        return "buffer"

    def measure(self, x: Tensor, grid: Grid) -> Place:
        return self.start.measure(x, grid)


@dataclass(frozen=True)
class Learned(Scale):
    """A parameter with LSQ's gradient, started by `start`; with a start that has a zero or an offset, that is learned too.

    Source: LSQ (arXiv 1902.08153) for s, LSQ+ (arXiv 2004.09576) for the offset, torch's learnable fake quantization for the zero.
    """

    start: Scale = AbsMax()
    gradient: str = field(default="clipped", kw_only=True)
    factor: str | float = field(default="lsq", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient not in ("clipped", "value"):
            raise QuantError(f"Learned(gradient={self.gradient!r}): a learned scale hears 'clipped' or 'value'; "
                             f"freeze it, or take {self.start!r} itself")

    @property
    def keeps(self) -> str:
        return "parameter"

    def measure(self, x: Tensor, grid: Grid) -> Place:
        return self.start.measure(x, grid)


def _end(grid: Grid) -> float:
    """The end on which the largest value lands: the high one, or the low one of a grid that has nothing above zero (one signed bit)."""
    return grid.high or -grid.low
