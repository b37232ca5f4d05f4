"""Partial: signs for most of a tensor, a finer grid for the salient rest of it, chosen element by element by a mask.

    y = M ? high(x) : a sign(x),    a = mean|x| over what is not salient, of a group
    dx = a g where not salient, 0 where salient; a hears nothing and is measured anew in every forward

a is the least-squares step of the group on its signs. What is salient is kept as it was when the mask was taken: as codes of `high`, beside the mask,
which no optimizer can move. The mask is found by size (`largest`) or at both ends (`tails`), or given. PB-LLM (arXiv 2310.00034) trains with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .error import QuantError
from .grain import Grain, PerChannel
from .grid import Grid, Sign, Uniform
from .place import Place, decode
from .qtensor import Masked, QTensor
from .quantizer import Known, Quant, Quantizer, working
from .scale import AbsMean, MinMax, Scale


@dataclass(frozen=True)
class Partial(Quant):
    """Signs times the mean of their sizes, but for the `salient` part of the weights, which keeps the numbers of `high` (None: its values as they
    are; nothing then can be stored). metric: how the mask is found where none is given, magnitude or tails."""

    grid: Grid = Sign()
    grain: Grain = PerChannel()
    scale: Scale = AbsMean()
    salient: float = 0.1
    metric: str = "magnitude"
    high: Quant | None = Quant(Uniform(8, False), PerChannel(), MinMax())

    @property
    def bits(self) -> float:  # type: ignore[override]
        return 1 + (1 - self.salient) + self.salient * (32 if self.high is None else self.high.bits)

    @property
    def label(self) -> str:
        return f"signs, {self.salient:.0%} {'full' if self.high is None else f'{self.high.bits}b'}"

    @property
    def several(self) -> str:
        return ("salient weights in 8 bits stand among signs, chosen one by one by a mask, and no block or layer of this format has a place for two "
                "kinds of codes; train without a target: the packed directory holds it, and gguf:f32 its plain values")

    def build(self) -> Partly:
        return Partly(self)

    def quantize(self, x: Tensor) -> Any:
        return self.build().initialise(x).quantize(x)

    def hard(self, x: Tensor) -> Tensor:
        return self.build().initialise(x).hard(x)


class Signs(torch.autograd.Function):
    """x, mask, kept values, a (all of x's shape, or broadcast) -> where(mask, kept, a sign x); dx = a g where not masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, kept: Tensor, a: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(mask, a)
        return torch.where(mask, kept, decode(grid.snap(x), Place(a)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        mask, a = ctx.saved_tensors
        return g * a * ~mask, None, None, None, None


class Partly(Quantizer):
    """The module of `Partial`: buffers `mask` (bool), `kept` (the salient codes in the order of rows, or values) and, with codes, the steps and zeros
    of their rows."""

    mask: Tensor
    kept: Tensor
    kept_scale: Tensor | None
    kept_zero: Tensor | None

    def __init__(self, quant: Partial) -> None:
        super().__init__(quant)
        for name in ("mask", "kept", "kept_scale", "kept_zero"):
            self.register_buffer(name, None)

    @property
    def ready(self) -> bool:
        return self.mask is not None

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Partly:
        if not torch.isfinite(x).all():
            raise QuantError(f"a tensor of shape {tuple(x.shape)} holds NaN or infinity; a mask found on it would spoil the layer")
        how: Any = self.quant
        return self.keep(x, tails(x, how.salient) if how.metric == "tails" else largest(x.abs(), how.salient))

    @torch.no_grad()
    def keep(self, x: Tensor, mask: Tensor) -> Partly:
        """From now on the elements of x where the mask is True are kept as they are now, in the numbers of `high`."""
        high, x = self.quant.high, working(x)  # type: ignore[attr-defined]
        self.mask, self.kept = mask, x[mask]
        if high is not None:
            q = high.quantize(x)
            self.kept, self.kept_scale, self.kept_zero = q.codes[mask], q.scale, q.zero
        return self

    def one(self) -> QTensor:
        """The salient part, as a tensor of the whole shape."""
        high = self.quant.high  # type: ignore[attr-defined]
        if high is None:
            raise QuantError("salient weights in full precision have no codes; give high= a Quant to store them")
        codes = torch.zeros(self.mask.shape, dtype=torch.uint8, device=self.mask.device).masked_scatter_(self.mask, self.kept)
        assert self.kept_scale is not None
        return QTensor(codes, self.kept_scale, self.kept_zero, None, high.grid, high.grain, high.scale.dtype)

    def step(self, x: Tensor) -> Tensor:
        """a: mean|x| over what is not salient, (groups, 1), as it is stored."""
        view, rest = self.quant.grain.view(working(x.detach()).abs()), self.quant.grain.view((~self.mask).to(working(x).dtype))
        return self.quant.scale.cast((view * rest).sum(-1, keepdim=True) / rest.sum(-1, keepdim=True).clamp(min=1))

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        if not self.on:
            return x
        if shift is not None:
            raise QuantError("an adapter in the grid has no place among signs; take inside, after or beside")
        kept = torch.zeros_like(x).masked_scatter_(self.mask, self.kept) if self.quant.high is None else self.one().dequantize()  # type: ignore
        a = self.quant.grain.back(self.step(x).expand_as(self.quant.grain.view(x)), x.shape)
        y = Signs.apply(working(x), self.mask, kept, a, self.quant.grid).to(x.dtype)
        return torch.lerp(x, y, self.blend) if self.training and self.blend < 1 else y

    @torch.no_grad()
    def known(self, x: Tensor, shift: Tensor | None = None, into: Tensor | None = None) -> Known:
        y = self.forward(x, shift)
        return Known(y if into is None else into.copy_(y), Place(self.step(x)))

    @torch.no_grad()
    def quantize(self, x: Tensor, shift: Tensor | None = None) -> Any:
        codes = self.quant.grid.encode(self.quant.grid.snap(working(x)))
        return Masked(self.mask.clone(), self.one(), QTensor(codes, self.step(x).squeeze(-1), None, None, self.quant.grid, self.quant.grain,
                                                             self.quant.scale.dtype))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        kinds = {"mask": torch.bool, "kept": torch.uint8 if self.quant.high is not None else torch.float32}  # type: ignore[attr-defined]
        for name in ("mask", "kept", "kept_scale", "kept_zero"):
            found, own = state.get(prefix + name), getattr(self, name)
            if found is not None and (own is None or own.shape != found.shape):
                setattr(self, name, torch.empty(found.shape, dtype=kinds.get(name, torch.float32), device=found.device))
        super()._load_from_state_dict(state, prefix, *rest)


def largest(v: Tensor, share: float) -> Tensor:
    """True for the `share` largest of v, a bool tensor of its shape; as in the authors' code the smallest of them, the threshold, is left out,
    and what ties with it.

    >>> largest(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
    tensor([[False, False],
            [False,  True]])
    """
    if not 0 <= share <= 1:
        raise QuantError(f"salient={share:g}: a share of the weights, from 0 to 1")
    if share == 1:
        return torch.ones_like(v, dtype=torch.bool)
    return v > v.flatten().sort().values[min(int(v.numel() * (1 - share)), v.numel() - 1)]


def tails(w: Tensor, share: float) -> Tensor:
    """True beyond the share / 2 lowest and highest numbers, those themselves left out."""
    if not 0 <= share <= 1:
        raise QuantError(f"salient={share:g}: a share of the weights, from 0 to 1")
    order, n = w.flatten().sort().values, w.numel()
    low, high = int(n * share / 2), int(n * (1 - share / 2))
    return (w < order[low - 1] if low else torch.zeros_like(w, dtype=torch.bool)) | (w > order[high - 1] if high else w > order[0])
