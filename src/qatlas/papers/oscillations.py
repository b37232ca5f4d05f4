"""Oscillations: weights that hover around the edges of their bins, induced, damped or frozen.

Jonathan Wenshoj, Bob Pepin, Raghavendra Selvan, "Oscillations Make Neural Networks Robust to Quantization", TMLR 2025, arXiv 2502.00490. Official
code: saintslab/osc_reg. And the opposite view: Markus Nagel, Marios Fournarakis et al., "Overcoming Oscillations in Quantization-Aware Training",
ICML 2022, arXiv 2203.11086. Official code: Qualcomm-AI-research/oscillations-qat. Regulariser, tracking, freezing and dampening were checked in both
codes; recipes are partly from summaries of the papers.

Take one weight and one input. With q the nearest level, the straight-through gradient of a quantized model is

    d/dw L(q(w)) = d/dw L(w) + E[x^2] (q(w) - w)

that of full precision and a second term. A step of descent along the second pushes w away from its level, towards the edge of the bin; beyond the
edge it pushes back: the weight oscillates. The first paper says that this is what quantization-aware training has to give. It adds only that term to
training in full precision, and rounds once, at the end:

    induce    L + lambda sum_layers mean(q^2 - w^2)          gradient  (2 lambda / n) (q - w),  n weights in the layer

The second paper says that oscillation spoils the statistics of batch norms and never converges, and takes it away from training with quantizers:

    dampen    L + lambda(t) sum_w (q - w)^2 inside the grid  gradient  -2 lambda (q - w): the same with the other sign; lambda rises along a cosine
    freeze    a weight whose integer turns back too often (a running frequency above a threshold that falls along a cosine) stays on the mean of its
              integers for good
    plain     straight-through alone: the control of all three

`induce` has one step for each matrix, s = max|w| / (2^(b-1) - 1), measured anew (2 bits are -1, 0, 1). Its step hears R as well: the authors do not
detach it, so the largest weight of a layer gets a gradient for all others (`detach` takes it away). The other modes learn one step a channel, as LSQ
does, started at the least squared error, unless `learned` says otherwise. All are of weights only. The mean over each layer makes lambda / n
what acts on a weight: a search is for one model and one number of bits. Lambda 0 is training in full precision, bit for bit.

Otherwise than the authors:
- R is over the layers that the rules quantize; their code takes every module with a `weight`, so norms too unless they are excluded by name.
- A target (gguf:q4_0, ...) rounds the step to its type, in R as well.
- A frozen weight lies on its level, s times its integer, after every step, and follows a changing s. It gives its step no gradient; theirs gives one.
- Every quantized weight is tracked, theirs those of at most 4 bits. No early stopping by the score of the rounded model: the last state is kept.
- AdamW and a cosine in all modes. The second paper trains weights by SGD.
- `reestimate` measures batch norms anew after training (50 batches there; off here).

Numbers of ours: docs/results.md#oscillations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.error import QuantError, RunError
from ..core.estimator import Clip, Ste, settle
from ..core.grain import PerChannel, PerTensor
from ..core.grid import Uniform
from ..core.place import locate
from ..core.qtensor import QTensor
from ..core.quantizer import Quant, Quantizer, working
from ..core.scale import AbsMax, Learned, MseSearch
from ..layers.quantized import Quantized
from ..layers.rows import RowsQuantizer
from ..model.coverage import describe
from ..model.quantized import quantized
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.evaluate import judged
from ..train.fit import fit
from ..train.imitate import bare
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.tactic import Loop, Tactic
from ..train.task import Batch, Task, device, moved
from ..train.teacher import full_precision

CLAIM = "Training in full precision with oscillations induced, rounded once at the end, recovers what quantized training reaches, from 3 bits on."
Mode = Literal["induce", "dampen", "freeze", "plain"]
STRENGTH = {"induce": 300.0, "dampen": 0.1}                       # ours, for layers of some thousand weights; the authors', for MobileNetV2


def tensors(model: nn.Module) -> Iterator[tuple[Quantizer, Tensor]]:
    """Each weight quantizer and the weight that it sees, with its graph; tied weights once."""
    done: set[int] = set()
    for layer in quantized(model).values():
        inner: Any = layer.weight_quantizer
        if inner is None or id(inner) in done:
            continue
        done.add(id(inner))
        parts: Any = inner.parts if isinstance(inner, RowsQuantizer) else [inner]
        yield from ((part, w) for part, w in zip(parts, layer.source().chunk(len(parts)), strict=True) if isinstance(part, Quantizer))


def inducing(model: nn.Module) -> Tensor:
    """R / lambda: the sum over the weights of mean(q^2 - w^2), also where quantizers are off."""
    terms = []
    for quantizer, w in tensors(model):
        with lit(quantizer):
            terms.append((quantizer(w).square() - w.square()).mean())
    return torch.stack(terms).sum()


def dampening(model: nn.Module) -> Tensor:
    """The sum over all weights inside their grids of (q - w)^2, q held."""
    terms = []
    for quantizer, w in tensors(model):
        _, _, inside, values = _places(quantizer, w)
        terms.append((values - quantizer.quant.grain.view(working(w)))[inside].square().sum())
    return torch.stack(terms).sum()


@torch.no_grad()
def at_edges(model: nn.Module, within: float = 0.1) -> float:
    """The share of the quantized weights that lie within so many steps of an edge between two bins."""
    near, total = 0, 0
    for quantizer, w in tensors(model):
        u, v, inside, _ = _places(quantizer, w)
        near, total = near + int(((u - v).abs() >= 0.5 - within)[inside].sum()), total + w.numel()
    return near / max(total, 1)


@torch.no_grad()
def _places(quantizer: Quantizer, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, whether u is inside the grid, and the values, of a weight's view."""
    quant = quantizer.quant
    view = quant.grain.view(working(w))
    place = settle(quantizer.place(view), quant)
    u = locate(view, place)
    with lit(quantizer):
        values = quant.grain.view(quantizer.hard(w))
    return u, quant.grid.snap(u), quant.grid.inside(u), values


@contextlib.contextmanager
def lit(quantizer: Quantizer) -> Iterator[None]:
    """The quantizer on inside, afterwards as it was."""
    before, quantizer.on = quantizer.on, True
    try:
        yield
    finally:
        quantizer.on = before


class Inducing:
    """A loss for `fit`: the task's, and `strength` times R. Strength 0 is the task's, bit for bit."""

    def __init__(self, task: Task, strength: float) -> None:
        self.task, self.strength = task, strength

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.task.loss(model, batch)
        return value + self.strength * inducing(bare(model)) if self.strength else value


class Dampen(Tactic):
    """Add lambda(t) `dampening`, lambda rising along a cosine from 0 to `strength`."""

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def loss(self, loop: Loop, loss: Tensor, batch: Batch) -> Tensor:
        now = self.strength * (1 - math.cos(math.pi * loop.progress)) / 2
        return loss + now * dampening(loop.model) if now else loss


class Track(Tactic):
    """Follow the integer of every quantized weight; freeze what oscillates.

    A switch against the direction of the switch before it is an oscillation; `momentum` is that of its frequency and of the mean integer. The
    threshold falls along a cosine from `threshold` to `end`; 0 freezes nothing, and the run is as without.
    """

    def __init__(self, threshold: float = 0.1, end: float = 0.01, momentum: float = 0.01) -> None:
        self.threshold, self.end, self.momentum = threshold, end, momentum
        self._seen: dict[str, dict[str, Tensor]] = {}

    def start(self, loop: Loop) -> None:
        for name, layer in loop.layers():
            if self.threshold:
                _freezable(name, layer)
            codes = layer.quantize().codes
            still, no = torch.zeros_like(codes, dtype=torch.int8), torch.zeros_like(codes, dtype=torch.bool)
            self._seen[name] = {"codes": codes, "turn": still, "often": torch.zeros_like(codes, dtype=torch.float32), "mean": codes.float(),
                                "frozen": no, "held": codes.clone()}

    def grads(self, loop: Loop) -> None:
        for name, layer in loop.layers() if self.threshold else ():
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(layer.unmatrix(self._seen[name]["frozen"]), 0)

    @torch.no_grad()
    def after(self, loop: Loop) -> None:
        limit = self.limit(loop.progress)
        for name, layer in loop.layers():
            q, seen = layer.quantize(), self._seen[name]
            self.follow(seen, torch.where(seen["frozen"], seen["held"], q.codes))
            if limit:
                new = (seen["often"] > limit) & ~seen["frozen"]
                seen["held"] = torch.where(new, seen["mean"].round().to(q.codes.dtype), seen["held"])
                seen["frozen"] = seen["frozen"] | new
                _rest(layer, q, seen["frozen"], seen["held"])

    def follow(self, seen: dict[str, Tensor], codes: Tensor) -> None:
        """One observation of the integers of one weight."""
        turn = (codes.int() - seen["codes"].int()).sign().to(torch.int8)
        seen["often"].lerp_((turn * seen["turn"] == -1).float(), self.momentum)
        seen["mean"].lerp_(codes.float(), self.momentum)
        seen["turn"], seen["codes"] = torch.where(turn != 0, turn, seen["turn"]), codes

    def limit(self, progress: float) -> float:
        """The threshold at a part of the run; 0 freezes nothing."""
        return self.end + (self.threshold - self.end) * (1 + math.cos(math.pi * progress)) / 2 if self.threshold else 0.0

    def shares(self, often: float = 0.005) -> dict[str, float]:
        """Of all weights: the share that oscillates with more than this frequency and is not frozen, and the frozen share."""
        total = max(sum(seen["codes"].numel() for seen in self._seen.values()), 1)
        count = [sum(int(mask.sum()) for mask in masks) for masks in ([(s["often"] > often) & ~s["frozen"] for s in self._seen.values()],
                                                                      [s["frozen"] for s in self._seen.values()])]
        return {"oscillating": count[0] / total, "frozen": count[1] / total}

    def state_dict(self) -> dict[str, Any]:
        return {f"{name}.{what}": t for name, seen in self._seen.items() for what, t in seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for full, t in state.items():
            name, _, what = full.rpartition(".")
            self._seen[name][what] = t.to(self._seen[name][what].device)


def _freezable(name: str, layer: Quantized) -> None:
    """Raise RunError where a weight cannot be put on its level and stay there."""
    if layer.transform is not None or layer.adapter is not None:
        raise RunError(f"{name} has a transform or an adapter: its weight is no place on the grid, and cannot be frozen there")
    inner: Any = layer.weight_quantizer
    loose = [part for part in inner.modules() if isinstance(part, Quantizer) and part.quant.scale.keeps != "parameter"]
    if loose:
        raise RunError(f"{name} measures its step anew in each forward ({type(loose[0].quant.scale).__name__}): an integer that is frozen under one "
                       "step would be another under the next. Freeze under Learned steps")


def _rest(layer: Quantized, q: QTensor, frozen: Tensor, held: Tensor) -> None:
    """Put the frozen weights onto their levels."""
    if frozen.any():
        level = dataclasses.replace(q, codes=torch.where(frozen, held, q.codes)).dequantize()
        layer.weight.copy_(torch.where(layer.unmatrix(frozen), layer.unmatrix(level), layer.weight))


@torch.no_grad()
def reestimate(model: nn.Module, task: Task, batches: int = 50) -> int:
    """Measure the batch norms' statistics anew: plain means over training batches, all else in eval mode. 0 batches leave them. -> how many norms"""
    norms = [m for m in model.modules() if batches and isinstance(m, _BatchNorm) and m.track_running_stats]
    with judged(model):
        rates = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True             # None: a plain mean
        for step in range(batches if norms else 0):
            task.logits(model, moved(task.batch(step), device(model)))
        for norm, rate in zip(norms, rates, strict=True):
            norm.momentum = rate
    return len(norms)


def oscillations(model: nn.Module, task: Task, *, mode: Mode = "induce", bits: int = 3, strength: float | None = None, detach: bool = False,
                 learned: bool | None = None, threshold: float = 0.1, threshold_end: float = 0.01, momentum: float = 0.01,
                 reestimation: int = 0, lr: float = 1e-3, scale_lr: float = 0.01, weight_decay: float = 0.0, warmup: float = 0.05,
                 steps: int = 400) -> nn.Module:
    """Train with oscillations induced, damped or frozen.

    Args:
        mode: induce trains in full precision with the regulariser and rounds at the end; dampen, freeze and plain train with quantizers.
        bits: bits of the weights, 2 to 8.
        strength: lambda of induce or dampen; None is 300 (layers of some thousand weights; larger ones want more: search) or 0.1.
        detach: the step does not hear the regulariser (induce).
        learned: learn one step a channel in place of a fresh one a matrix; None does so in all modes but induce.
        threshold: frequency of oscillation above which a weight is frozen, at the beginning; at least two or three times `momentum` (freeze).
        threshold_end: the same at the end, along a cosine.
        momentum: of the frequency and of the mean integer (freeze).
        reestimation: training batches on which batch norms are measured anew at the end; 0 leaves them.
        lr: peak learning rate of the weights.
        scale_lr: peak learning rate of learned steps, as a share of each step's own size (all modes but induce).
        weight_decay: of matrices only; it fights the regulariser.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits outside of 2 to 8. RunError: a mode, strength or threshold that does not exist, or that the mode does not take.
    """
    weight = of_weight(mode, bits, detach, learned)
    amount = lam(mode, strength)
    if mode == "freeze" and not 0 < threshold_end <= threshold:
        raise RunError(f"threshold={threshold} to threshold_end={threshold_end}: the threshold falls, and stays above 0 (at 0 nothing would freeze)")
    tactics: dict[str, list[Tactic]] = {"dampen": [Dampen(amount)], "freeze": [Track(threshold, threshold_end, momentum)]}
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight)], task)
    describe(model, task.probe()).check()
    induced = mode == "induce"
    with full_precision(model) if induced else contextlib.nullcontext():
        fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps,
            loss=Inducing(task, amount) if induced else None, tactics=tactics.get(mode, ()))
    reestimate(model, task, reestimation)
    return model


def of_weight(mode: str, bits: int, detach: bool = False, learned: bool | None = None) -> Quant:
    """Of a weight: a fresh step for each matrix, or a learned one a channel; None is what suits the mode."""
    if mode not in ("induce", "dampen", "freeze", "plain"):
        raise RunError(f"mode={mode!r}: the modes are induce, dampen, freeze and plain")
    if bits not in range(2, 9):
        raise QuantError(f"oscillations are of weights of 2 to 8 whole bits, not bits={bits!r}")
    learned = mode != "induce" if learned is None else learned
    if (mode == "induce" and learned) or (mode == "freeze" and not learned):
        raise RunError(f"mode={mode!r} with learned={learned}: induce rounds once at the end, so nothing would teach its steps; freeze needs steps "
                       "that stay where they are")
    if not learned:
        return Quant(Uniform(bits, narrow=True), PerTensor(), AbsMax(gradient="statistic" if mode == "induce" and not detach else "none"), Ste())
    return Quant(Uniform(bits), PerChannel(), Learned(MseSearch()), Clip())


def lam(mode: str, strength: float | None) -> float:
    """Lambda of a mode."""
    if strength is None:
        return STRENGTH.get(mode, 0.0)
    if mode not in STRENGTH or strength < 0:
        raise RunError(f"strength={strength} with mode={mode!r}: lambda is 0 or more, of induce and dampen only")
    return strength
