"""Overcoming oscillations: weights that jump between two levels are frozen on one, or damped.

Markus Nagel, Marios Fournarakis, Yelysei Bondarenko, Tijmen Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv 2203.11086. Official code: Qualcomm-AI-research/oscillations-qat. Tracking, freezing and dampening were checked in their code; recipes are
partly from summaries of the paper.

The straight-through gradient of a weight changes its sign where the weight crosses the edge of a bin, so a weight whose optimum lies between two
levels jumps between them for ever. That spoils the running statistics of batch norms, and the weight ends where the last jump left it. The paper
measures it in the integers x_int = clamp(round(w / s)) and takes it away in two ways:

    freeze    o = a switch of x_int against the direction of the switch before,  f <- m o + (1 - m) f
              where f > f_th, which falls along a cosine: x_int stays on the mean of the integers (a running one, by m), rounded, for good
    dampen    L + lambda(t) sum_w (q - w)^2 inside the grid,    gradient  -2 lambda (q - w);   lambda rises along a cosine from 0

The second is the regulariser of papers/oscillations.py with the other sign. Base is LSQ with one learned step a channel, started at the least squared
error. Freezing alone is the default; both may act, and with both at 0 the run is LSQ, bit for bit. Of weights only.

A frozen weight lies on its level, s times its integer, after every step, and follows a changing s. So its step must be one that lasts (a learned
one), and it can have neither transform nor adapter.

Otherwise than the authors:
- A frozen weight gives its step no gradient; theirs gives one.
- Every quantized weight is tracked, theirs those of at most 4 bits.
- AdamW and a cosine; theirs is SGD, with Adam for the steps.
- `reestimation` measures batch norms anew after training (50 batches there; off here, most models have none).

Numbers of ours: docs/results.md#oscillations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.error import RunError
from ..core.estimator import Clip
from ..core.grain import PerChannel
from ..core.qtensor import QTensor
from ..core.quantizer import Quant, Quantizer, working
from ..core.scale import Learned, MseSearch
from ..layers.quantized import Quantized
from ..model.coverage import describe
from ..model.places import places, weights
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.renorm import reestimate
from ..train.schedule import cosine
from ..train.tactic import Loop, Tactic
from ..train.task import Batch, Task
from ..train.track import Track
from .lsq import mean, signed

CLAIM = "Freezing or damping what oscillates takes MobileNetV2 at 3 bits from 65 to 68 % (ImageNet), above LSQ with batch norms measured anew."


def dampening(model: nn.Module) -> Tensor:
    """The sum over all weights inside their grids of (q - w)^2, q held."""
    terms = []
    for quantizer, w in weights(model):
        _, _, inside, values = places(quantizer, w)
        terms.append((values - quantizer.quant.grain.view(working(w)))[inside].square().sum())
    return torch.stack(terms).sum()


class Dampen(Tactic):
    """Add lambda(t) `dampening`, lambda rising along a cosine from 0 to `strength`."""

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength

    def loss(self, loop: Loop, loss: Tensor, batch: Batch) -> Tensor:
        now = self.strength * (1 - math.cos(math.pi * loop.progress)) / 2
        return loss + now * dampening(loop.model) if now else loss


class Still(Track):
    """Freeze what oscillates more often than a threshold, which falls along a cosine from `threshold` to `end`; 0 freezes nothing.

    >>> [round(Still(0.1, 0.01).limit(p), 4) for p in (0, 0.5, 1)]
    [0.1, 0.055, 0.01]
    """

    def __init__(self, threshold: float = 0.1, end: float = 0.01, momentum: float = 0.01) -> None:
        super().__init__(momentum)
        self.threshold, self.end = threshold, end

    def start(self, loop: Loop) -> None:
        for name, layer in loop.layers() if self.threshold else ():
            _freezable(name, layer)
        super().start(loop)
        for seen in self._seen.values():
            seen |= {"frozen": torch.zeros_like(seen["codes"], dtype=torch.bool), "held": seen["codes"].clone()}

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

    def limit(self, progress: float) -> float:
        """The threshold at a part of the run."""
        return self.end + (self.threshold - self.end) * (1 + math.cos(math.pi * progress)) / 2 if self.threshold else 0.0

    def turning(self, often: float = 0.005) -> float:
        """As Track.turning, frozen ones left out."""
        return self.share(lambda seen: (seen["often"] > often) & ~seen["frozen"])

    def frozen(self) -> float:
        """The share of all weights that is frozen."""
        return self.share(lambda seen: seen["frozen"])


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


def overcoming_oscillations(model: nn.Module, task: Task, *, bits: float = 3, threshold: float = 0.1, threshold_end: float = 0.01,
                            momentum: float = 0.01, strength: float = 0.0, start: Literal["mse", "mean"] = "mse", reestimation: int = 0,
                            lr: float = 1e-3, scale_lr: float = 0.01, weight_decay: float = 0.0, warmup: float = 0.05, steps: int = 400) -> nn.Module:
    """Train all weights and their steps as LSQ does, with oscillating weights frozen, damped, or both.

    Args:
        bits: bits of the weights, 1.58 or 2 to 8.
        threshold: frequency of oscillation above which a weight is frozen, at the beginning; at least two or three times `momentum`. 0 freezes none.
        threshold_end: the same at the end, along a cosine.
        momentum: of the frequency and of the mean integer.
        strength: lambda of dampening at the end, 0.1 for the authors' MobileNetV2; 0 damps nothing.
        start: of a learned step: mse (least squared error), or mean (of |w|, as LSQ's own).
        reestimation: training batches on which batch norms are measured anew at the end; 0 leaves them.
        lr: peak learning rate of the weights.
        scale_lr: peak learning rate of the steps, as a share of each step's own size.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits that LSQ does not speak of.
        RunError: a threshold that rises or ends at 0, a strength below 0, a start that does not exist, a weight that cannot be frozen.
    """
    weight = of_weight(bits, start)
    if strength < 0:
        raise RunError(f"strength={strength}: lambda is 0 or more")
    if threshold and not 0 < threshold_end <= threshold:
        raise RunError(f"threshold={threshold} to threshold_end={threshold_end}: the threshold falls, and stays above 0; threshold=0 freezes nothing")
    tactics: list[Tactic] = ([Dampen(strength)] if strength else []) + ([Still(threshold, threshold_end, momentum)] if threshold else [])
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight)], task)
    describe(model, task.probe()).check()
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps, tactics=tactics)
    reestimate(model, task, reestimation)
    return model


def of_weight(bits: float, start: str = "mse") -> Quant:
    """Of a weight: a learned step a channel."""
    if start not in ("mse", "mean"):
        raise RunError(f"start={start!r}: a learned step starts at mse or mean")
    return Quant(signed(bits), PerChannel(), Learned(MseSearch() if start == "mse" else mean(bits)), Clip())
