"""Tokens of two widths: which of them have few bits is found in attention, and read by all that runs after it in the same forward.

    Sorted   a Quant at the attention scores: looks at them, lets them pass, and marks the tokens that look at the first token least
    Mixed    a Quant of any other activation: marked tokens have `low` bits, all others the grid's, each with a step of its own

What is marked in a layer serves all that is computed until the next layer's scores: its values and feed-forward part, then the next layer's input,
queries and keys. Before the first attention there are no marks, and a Mixed there is an error. Source: EdgeQAT (arXiv 2402.10787).

A score asks for nothing that comes after a token, its rank among all does. So the rank decides in training only, row by row; the score at which it
decides is remembered (a running mean), and outside of training a token is narrow where it scores below: a decoder stays one. Keys and values that
come from a cache bring no scores with them: the marks of their tokens are remembered beside it. A cache that was moved (beam search), cut or made
elsewhere is refused.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.error import QuantError
from ..core.grain import Grain, PerTensor
from ..core.grid import Grid, Uniform
from ..core.qtensor import QTensor
from ..core.quantizer import Known, Quant, Quantizer
from .attention import recomputing


class Marks(NamedTuple):
    """Which tokens are narrow: (batch, tokens so far), and how many of them are new in this forward."""

    low: Tensor
    new: int


MARKS: ContextVar[Marks | None] = ContextVar("marks", default=None)          # of the attention that ran last, in this forward


@dataclass(frozen=True)
class Sorted(Quant):
    """At the attention scores: looks at them, lets them pass, and marks the part `share` of the tokens that looks at the first token least."""

    grid: Grid = Uniform(8)
    grain: Grain = field(default=PerTensor())
    share: float = 0.5
    momentum: float = 0.99
    plain: ClassVar[bool] = False
    watches: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"marks {self.share:g} of the tokens"

    def build(self) -> Sorting:
        return Sorting(self)


class Sorting(Quantizer):
    """The module of `Sorted`: scores (batch, heads, tokens, keys) -> themselves. In training by rank, else by the threshold that it has seen."""

    quant: Sorted
    threshold: Tensor

    def __init__(self, quant: Sorted) -> None:
        super().__init__(quant)
        self._past: Tensor | None = None
        self.register_buffer("threshold", torch.tensor(math.nan))

    @property
    def ready(self) -> bool:
        return not bool(self.threshold.isnan())

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        score = first_score(x.detach()) if self.on else None
        if score is not None and self._seen is not None:
            self._seen.append(self.edge(score))
        elif score is not None:
            self._mark(score, x.shape[-1], learns=self.training and x.requires_grad)
        return x

    def edge(self, score: Tensor) -> Tensor:
        """(batch, tokens) -> (batch,): between the last narrow and the first wide token of a row."""
        k, order = self.narrow(score), score.sort(-1).values
        if 0 < k < score.shape[1]:
            return (order[:, k - 1] + order[:, k]) / 2
        return torch.full_like(order[:, 0], math.inf if k else -math.inf)

    def narrow(self, score: Tensor) -> int:
        """How many of the tokens."""
        return math.floor(self.quant.share * score.shape[1])

    def settle(self, gather: Any = None) -> None:
        if not self._seen:
            return super().settle(gather)                         # nothing to end, or nothing seen, which is an error
        self.threshold.copy_(torch.cat(self._seen).mean())
        self._seen = None

    @torch.no_grad()
    def _mark(self, score: Tensor, keys: int, learns: bool) -> None:
        if recomputing():
            raise QuantError("gradient checkpointing runs a block again without the one before it, which says how many bits its tokens have; switch "
                             "it off, or give all tokens the same bits (low_bits=None)")
        if not self.ready:
            raise QuantError("the threshold of narrow tokens is not calibrated: run calibrate(model, task) before the first step")
        low = score < self.threshold
        if self.training:
            low = score.argsort(dim=-1, stable=True).argsort(-1) < self.narrow(score)
        if learns:
            edge = self.edge(score).mean()
            mixed = torch.lerp(edge, self.threshold, self.quant.momentum)
            self.threshold.copy_(mixed if mixed.isfinite() else edge)
        rows, new = score.shape
        if keys != new:                                           # a cache goes on: its tokens' bits are those of the forwards before
            if self._past is None or self._past.shape != (rows, keys - new):
                there = "none" if self._past is None else f"{tuple(self._past.shape)}"
                raise QuantError(f"a cache brings {rows} rows of {keys - new} tokens whose bits are not known ({there} remembered): begin with the "
                                 "whole prompt and a cache that grows (not a static one, nor one of another forward), or take low_bits=None")
            low = torch.cat([self._past, low], 1)
        self._past = None if self.training else low
        MARKS.set(Marks(low, new))


def first_score(scores: Tensor) -> Tensor:
    """(batch, heads, tokens, keys), masked -> (batch, tokens): the score to the first token that any sees, a mean over heads."""
    seen = (scores[:, 0] > torch.finfo(scores.dtype).min / 2).any(1)                          # (batch, keys): padding on the left is seen by none
    first = seen.int().argmax(-1)[:, None, None, None].expand(*scores.shape[:3], 1)
    return scores.float().gather(-1, first).squeeze(-1).mean(1)


@dataclass(frozen=True)
class Mixed(Quant):
    """Of each token one of two: the grid's bits, or `low` of them, as it was marked."""

    low: int = 4
    plain: ClassVar[bool] = False

    def build(self) -> Mixing:
        return Mixing(self)


class Mixing(Quantizer):
    """The module of `Mixed`: itself for wide tokens, its child `low` for narrow ones. (batch, tokens, d), or (batch, heads, tokens, d)."""

    def __init__(self, quant: Mixed) -> None:
        super().__init__(quant)
        grid: Any = quant.grid
        self.low = Quantizer(Quant(Uniform(quant.low, grid.signed), quant.grain, quant.scale, quant.estimator))
        self._past: Tensor | None = None

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        wide, narrow = super().forward(x, shift, known), self.low(x)
        if not self.on or self._seen is not None:
            return x
        return torch.where(self.marked(x), narrow, wide)

    def marked(self, x: Tensor) -> Tensor:
        """Which tokens of x are narrow, laid out to meet it."""
        marks, tokens = MARKS.get(), x.shape[-2]
        if marks is None or x.dim() < 3 or len(marks.low) != len(x) or tokens not in (marks.new, marks.low.shape[1]):
            found = "no attention has run before it" if marks is None else f"the last attention marked {tuple(marks.low.shape)}"
            raise QuantError(f"a tensor of shape {tuple(x.shape)} is to have bits by token, and {found}. Blocks run in their model, after its first "
                             "attention; keep other layers full by a rule")
        if x.dim() == 4 and not self.training:
            self._same(x, tokens - marks.new if tokens > marks.new else 0)
        return marks.low[:, -tokens:].view(len(x), *[1] * (x.dim() - 3), tokens, 1)

    def _same(self, x: Tensor, old: int) -> None:
        """Raise QuantError where what a cache brings is not what was here before: its rows were moved."""
        now = x[:, 0, :, 0].detach()
        if old and not (self._past is not None and torch.equal(self._past, now[:, :old])):
            raise QuantError("the rows of the cache were moved, as beam search does, or are of another forward, and the bits of their tokens were "
                             "not: generate without beams, or take low_bits=None")
        self._past = now

    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        raise QuantError("a tensor whose tokens have two widths is no single QTensor; `hard` gives its values")
