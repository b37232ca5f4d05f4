"""EdgeQAT: quantization guided by entropy and distribution, tokens of two widths.

Xuan Shen et al., "EdgeQAT: Entropy and Distribution Guided Quantization-Aware Training for the Acceleration of Lightweight LLMs on the Edge", 2024,
arXiv 2402.10787, later versions "Squat". Official code: shawnricecake/EdgeQAT. Quantizers, losses and token selection were held against it
(tests/test_golden.py); what the published text says beyond it is second hand.

Small language models for phones: integers with one scale a matrix, for activations, too, queries and keys included. There quantization moves the
variance of queries and keys (by which the method measures their entropy), and the column of the attention map that looks at the first token fades.

    L   = (1 - distil) CE + distil T^2 KL(teachers || student) + distribution L_D + entropy L_E      teachers: mean logits; T = 2
    L_E = -log mean over layers, tokens, heads [log(1 + var q) + log(1 + var k)]                     q, k as quantized, var over features
    L_D = -log C,   C = mean over layers, rows, heads cos(A, A_full)                                 A = q k^T before mask and softmax

    weights      LSQ, one step a matrix
    activations  static, one learned step and one learned integer zero a tensor: inputs of layers, q and k (after rotary positions), v, probabilities
                 (always 8 bits). The input of the output projection stays full, and so do embeddings, head and norms
    tokens       a token's score in a layer is its attention score to the first token, a mean over heads. The lowest half has `low_bits`, the rest
                 `input_bits`, each with its own step and zero. What is found in a layer serves its v and its feed-forward part, then the attention
                 input, q and k of the next layer. The first layer's attention input, q and k have the wide ones

The score of a token asks for nothing that comes after it, its rank among all does. So in training the rank decides; outside of it a threshold, the
running mean of where the rank did (layers/tokens.py). A model that is told its text token by token then gives the same numbers as one that sees it
whole.

Otherwise than the authors:
- Their code adds log C, and so teaches the maps to differ. `form`: "log" is what is meant, "linear" is mean(1 - cos), "published" their sign. A
  cosine near or below zero has no logarithm; below 0.01 it goes on as a straight line.
- Theirs are sums over layers, rows and heads inside the logarithm; means have the same gradient, and values that do not depend on the batch.
- The maps are compared before the mask, as in their code, later tokens included; `maps="probabilities"` compares what attention uses.
- Their zero point starts at 0.1 (min - alpha Qn) in units of x and is then read in codes, so that it rounds to 0 nearly always. Ours starts at 0
  (`zero`: "learned"), "published" is their start, "none" has none. It stays on the grid.
- Their divergence is a sum over positions (`summed`); ours a mean, so that its weight does not depend on the length.
- Their set of narrow tokens is one for the whole batch, by its mean score; then rows move each other. Ours is a row's own. In their code tokens of
  two widths and the two losses are never on together; here they may be.
- Query, key and value projections each have a quantizer of their one input; theirs share one. Steps start from calibration, not from the first batch.
- Weight decay never reaches a step. Further teachers (theirs: of 360 and 705 million parameters) are `teachers`.

Numbers of ours: docs/results.md#edgeqat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.error import QuantError, RuleError
from ..core.estimator import Clip
from ..core.grain import PerChannel, PerTensor
from ..core.grid import Grid, Uniform
from ..core.place import Place
from ..core.quantizer import Quant
from ..core.scale import AbsMean, Learned, Scale
from ..layers.tokens import Mixed, Sorted
from ..model.blocks import blocks
from ..model.coverage import describe
from ..model.quantized import reachable
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..model.signals import attentions
from ..model.taps import read
from ..train import loss
from ..train.fit import fit
from ..train.imitate import bare, teacher_for
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Batch, Task
from ..train.teacher import Distil, Live, Once, Teacher
from .ternarybert import causal

CLAIM = "With entropy and distribution guided, W4A8 of a small language model loses almost nothing, weights with one step a matrix."
Form = Literal["log", "linear", "published"]
Maps = Literal["logits", "probabilities"]
Zero = Literal["learned", "published", "none"]
WHOLE, PROBABILITIES, FLOOR = range(2, 9), 8, 0.01


@dataclass(frozen=True)
class Start(Scale):
    """alpha = 2 mean|x| / sqrt(Qp), as LSQ, with a zero: 0, or the published 0.1 (min - alpha low)."""

    published: bool = False

    def measure(self, x: Tensor, grid: Grid) -> Place:
        s = AbsMean(2.0, per_root=True).measure(x, grid).s
        return Place(s, zero=0.1 * (x.amin(-1, keepdim=True) - s * grid.low) if self.published else torch.zeros_like(s))


def edgeqat(model: nn.Module, task: Task, *, bits: int = 4, input_bits: int | None = 8, low_bits: int | None = 4, low_share: float = 0.5,
            rows: bool = False, output_input: bool = False, zero: Zero = "learned", distil: float = 0.5, temperature: float = 2.0,
            entropy: float = 0.5, distribution: float = 1.0, form: Form = "log", maps: Maps = "logits", summed: bool = False,
            teachers: tuple[str, ...] = (), lr: float = 2.5e-4, scale_lr: float | None = None, weight_decay: float = 0.1, warmup: float = 0.05,
            steps: int = 400) -> nn.Module:
    """Fine-tune a decoder's weights, steps and zeros, guided by its full-precision self.

    Args:
        bits: bits of the weights, 2 to 8.
        input_bits: bits of the activations, 2 to 8; None leaves them in full precision.
        low_bits: bits of the narrow tokens' activations, fewer than input_bits; None gives all tokens the same.
        low_share: part of the tokens that is narrow.
        rows: one step for each output channel of a weight in place of one a matrix.
        output_input: quantize the input of the output projection, too.
        zero: learned (from 0), published (from the authors' start) or none.
        distil: weight of the teachers' divergence; the labels' cross entropy has the rest.
        temperature: of the divergence.
        entropy: weight of the entropy loss.
        distribution: weight of the distribution loss.
        form: of the distribution loss: log, linear, or published (with the authors' sign).
        maps: compare logits (before mask and softmax) or probabilities.
        summed: the divergence as a sum over a row's positions, as the authors have it.
        teachers: directories or Hub ids of further models with the same vocabulary; their logits are averaged with the full-precision model's.
        lr: peak learning rate.
        scale_lr: peak learning rate of steps and zeros, as a share of each one's own unit; None is lr itself, as the authors have it.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits that EdgeQAT does not speak of. RuleError: a model that is no decoder, or whose attention cannot be looked into.
        RunError: a teacher with another vocabulary.
    """
    first = teacher_for(model, task)
    others = [teacher_for(model, task, name) for name in teachers]
    guide: Live = Chorus([first, *others]) if others else first
    quantize(model, rules(model, bits=bits, input_bits=input_bits, low_bits=low_bits, low_share=low_share, rows=rows, output_input=output_input,
                          zero=zero), task)
    describe(model, task.probe()).check()
    objective: Any = Distil(task, guide, temperature=temperature, share=distil)
    if entropy or distribution or summed:
        objective = Guided(task, guide, first, model, distil=distil, temperature=temperature, entropy=entropy, distribution=distribution, form=form,
                           maps=maps, summed=summed)
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps, loss=objective)
    return model


def rules(model: nn.Module, *, bits: int = 4, input_bits: int | None = 8, low_bits: int | None = 4, low_share: float = 0.5, rows: bool = False,
          output_input: bool = False, zero: Zero = "learned") -> list[Rule]:
    """Which tensor has which numbers; arguments as in `edgeqat`."""
    for name, value in (("bits", bits), ("input_bits", input_bits), ("low_bits", low_bits)):
        if value is not None and value not in WHOLE:
            raise QuantError(f"EdgeQAT takes 2 to 8 whole bits, not {name}={value:g}")
    if low_bits is not None and (input_bits is None or low_bits >= input_bits or not 0 <= low_share <= 1):
        raise QuantError(f"low_bits={low_bits} of a part low_share={low_share:g} of the tokens, input_bits={input_bits} of the rest: narrow tokens "
                         "have fewer bits, and a part lies in 0 ... 1. Write low_bits=None (--low_bits null) for one width")
    near = list(attentions(model).values())
    if not causal(model) or not near:
        raise RuleError(f"{type(model).__name__} is no decoder whose attention can be looked into; EdgeQAT is for those")
    weight = Quant(Uniform(bits), PerChannel() if rows else PerTensor(), Learned(AbsMean(2.0, per_root=True), over="tensor"), Clip())
    full = keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER)
    if input_bits is None:
        return [*full, Rule("*", weight=weight)]
    wide: Quant = of_input(input_bits, zero=zero)
    mixed = wide if low_bits is None else Mixed(wide.grid, wide.grain, wide.scale, wide.estimator, low=low_bits)
    within = tuple(f"{name}." for name, _ in blocks(model))
    begin = [*(near[0].parts or [near[0].fused or f"{near[0].name}.*"]), *(name for name in reachable(model) if not name.startswith(within))]
    ends = [] if output_input else [Rule(one.out, input=None) for one in near if one.out]
    inside = [Rule(f"{Role.ATTENTION}:{name}", signal=mixed) for name in ("query", "key", "value")]
    inside.append(Rule(f"{Role.ATTENTION}:probabilities", signal=of_input(PROBABILITIES, False, zero)))
    if low_bits is not None:                                      # before the first attention no token is marked
        inside = [*(Rule(f"{near[0].name}:{name}", signal=wide) for name in ("query", "key")), *inside,
                  Rule(f"{Role.ATTENTION}:scores", signal=Sorted(share=low_share))]
        ends += [Rule(name, input=wide, optional=True) for name in begin]
    return [*full, *ends, *inside, Rule("*", weight=weight, input=mixed)]


def of_input(bits: int, signed: bool | None = None, zero: Zero = "learned") -> Quant:
    """Of an activation: a learned step and zero; signedness left to calibration, or said."""
    start: Scale = AbsMean(2.0, per_root=True) if zero == "none" else Start(zero == "published")
    return Quant(Uniform(bits, signed), PerTensor(), Learned(start, over="tensor"), Clip())


class Chorus(Live):
    """Several teachers: the mean of their logits."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers, self.source = teachers, ["chorus", len(teachers)]

    def __call__(self, task: Task, batch: Batch) -> Tensor:
        return chorus([teacher(task, batch) for teacher in self.teachers])


def chorus(said: Sequence[Tensor]) -> Tensor:
    """The mean of several teachers' logits."""
    for other in said[1:]:
        loss.same_classes(said[0], other)
    return torch.stack(list(said)).mean(0)


class Guided:
    """The whole loss for `fit`. guide: whose logits are learned from. full: the full-precision model, whose attention is compared with."""

    def __init__(self, task: Task, guide: Live, full: Teacher, student: nn.Module, *, maps: Maps = "logits", **weights: Any) -> None:
        self.source, self.task, self.guide, self.full, self.maps, self.weights = guide.source, task, guide, full, maps, weights
        names = list(attentions(student))
        parts = dict(student.named_modules())
        self._theirs = [f"{name}:{signal}" for name in names for signal in ("query", "key")]
        self._own = [f"{name}.{signal}_quantizer:output" if f"{name}.{signal}_quantizer" in parts else f"{name}:{signal}"
                     for name in names for signal in ("query", "key")]
        self._maps = [f"{name}:probabilities" for name in names] if maps == "probabilities" else []

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        said, theirs = self.full.signals(self.task, batch, self._maps or self._theirs)
        said = said if self.guide is self.full else self.guide(self.task, batch)
        with read(bare(model), [*self._own, *self._maps]) as own:
            logits = self.task.logits(model, batch)
        q, k = ([own[name] for name in self._own[i::2]] for i in (0, 1))
        if self._maps:
            maps, full = ([found[name] for name in self._maps] for found in (own, theirs))
        else:
            full = list(map(products, *([theirs[name] for name in self._theirs[i::2]] for i in (0, 1))))
            maps = list(map(products, q, k))
        counted = loss.predicted(batch["labels"]) if "labels" in batch else None
        return guided(self.task.loss(Once(logits), batch), logits, said, q, k, maps, full, counted=counted, seen=batch.get("attention_mask"),
                      **self.weights)


def guided(task: Tensor, logits: Tensor, said: Tensor, queries: Sequence[Tensor], keys: Sequence[Tensor], maps: Sequence[Tensor],
           theirs: Sequence[Tensor], *, distil: float = 0.5, temperature: float = 2.0, entropy: float = 0.5, distribution: float = 1.0,
           form: Form = "log", summed: bool = False, counted: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """The sum of the four terms. task: the loss by labels. Layer by layer: queries, keys (batch, heads, tokens, d), maps (batch, heads, tokens,
    tokens). counted, seen (batch, tokens): positions of the divergence, and tokens that are no padding."""
    soft = loss.kl(logits, said, temperature, counted)
    if summed:
        soft = soft * (logits.shape[1] if counted is None else counted.sum() / len(counted))
    total = (1 - distil) * task + distil * soft
    if entropy:
        total = total + entropy * entropy_loss(queries, keys, seen)
    return total + distribution * distribution_loss(maps, theirs, form, seen) if distribution else total


def entropy_loss(queries: Sequence[Tensor], keys: Sequence[Tensor], seen: Tensor | None = None) -> Tensor:
    """-log of the mean over layers, tokens and heads of log(1 + var q) + log(1 + var k)."""
    mask = None if seen is None else seen[:, None, :].bool()
    parts = [loss.average(torch.log1p(x.float().var(-1)), None if mask is None else mask.expand(x.shape[:-1])) for x in (*queries, *keys)]
    return -torch.stack(parts).mean().mul(2).log()


def distribution_loss(own: Sequence[Tensor], theirs: Sequence[Tensor], form: Form = "log", seen: Tensor | None = None) -> Tensor:
    """Of the mean cosine C of a head's whole map with the full-precision one's: -log C, 1 - C, or (published) log C."""
    mask = 1.0 if seen is None else (seen[:, None, :, None] * seen[:, None, None, :])
    cosines = [F.cosine_similarity((a.float() * mask).flatten(-2), (b.float() * mask).flatten(-2), dim=-1, eps=1e-6).mean()
               for a, b in zip(own, theirs, strict=True)]
    c = torch.stack(cosines).mean()
    if form == "linear":
        return 1 - c
    log = torch.where(c > FLOOR, c.clamp(min=FLOOR).log(), math.log(FLOOR) + (c - FLOOR) / FLOOR)
    return log if form == "published" else -log


def products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T of each head, (batch, heads, tokens, tokens); a scaling would not move a cosine."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
