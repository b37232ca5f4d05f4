"""CAGE: late in training, every weight is drawn towards its own grid.

Soroush Tabesh, Mher Safaryan, Andrei Panferov, Alexandra Volkova, Dan Alistarh (ISTA, Red Hat AI), "CAGE: Curvature-Aware Gradient Estimation for
Accurate Quantization-Aware Training", MLSys 2026, arXiv 2510.18784. Official code: IST-DASLab/CAGE; its class was checked through a public fork,
Keivin98/ECO-CAGE-QCRI, which left it unchanged. The listing of the paper is known from notes that agree with each other.

The straight-through gradient is that of the loss at Q(x) and never hears how far x is from Q(x); a point where it vanishes need not be one that the
rounded weights can reach. CAGE looks for a balance of two aims, the loss and the distance to the grid:

    grad f(Q(x)) + lambda (x - Q(x)) = 0

So each step ends with a pull, of any optimizer, after its own decoupled decay, and not divided by Adam's second moment:

    x <- optimizer(x, gradient)
    x <- x - lr lambda_t (x - Q(x)),        lambda_t = 0 while r <= silence, r = (t + 1) / T
                                                     = lambda (r - silence) / (1 - silence) from there on ("linear"), or lambda at once ("constant")

With Q locally constant each pull shortens the way to the nearest grid point by the factor 1 - lr lambda_t, so lr lambda_t must stay below 1. What is
left of the way at the end is the product of all factors (`left`): 0.07 to 0.20 in the authors' runs of 11,000 to 300,000 steps with lambda 10 and
silence 0.8; but 0.9 in a run of 1,000 steps at a rate of 1e-3, which is as good as nothing. A run of some hundred steps wants lambda 100 to 1,000.

`coupled` adds lambda_t (x - Q(x)) to the gradient instead, before the moments: only there does Adam's diagonal, the curvature of the name, see it.
For plain SGD both are one. Never both at once.

The pull is a tactic: how a step is taken stays the optimizer's, what comes behind it does not ask which one it was. Q(x) is `layer.hard()`, the
values that the layer computes with, in the weight's own space (a rotation is undone), of the weight as it now is, whatever quantizer it has.

The base is QuEST (a rotation in blocks of 128, Gaussian steps) as the authors' default has it: gradients pass up to the last level (their clip), not
by trust. Values beyond it are drawn back to it. `lsq` puts a learned step a channel in its place. Recipe and `scratch` are QuEST's.

Otherwise than the authors:
- Their code takes the learning rate of the next step, since its scheduler moves first; the paper's listing takes x - Q(x) from before the step. Ours:
  this step's rate, the weights behind the step. The differences are of the order of lr^2.
- Lambda 0, and the silence, are the run without CAGE bit for bit.

Numbers of ours: docs/results.md#cage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from ..core.error import RunError
from ..core.estimator import Clip
from ..core.grain import PerChannel, PerToken
from ..core.quantizer import Quant
from ..core.scale import Learned
from ..core.transform import Hadamard
from ..model.coverage import describe
from ..model.fresh import renew
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.tactic import Loop, Tactic
from ..train.task import Task
from .lsq import mean, of_input, signed
from .quest import gaussian

CLAIM = "In pre-training W3A3 with it reaches the loss of QuEST at W4A4; in fine-tuning it halves what quantization costs."
Shape = Literal["linear", "constant"]


class Cage(Tactic):
    """Draw each trained quantized weight towards what its layer computes with: after the step, or (`coupled`) in the gradient.

    >>> [Cage(10.0, 0.8).amount(step, 100) for step in (79, 89, 99)]
    [0.0, 5.0, 10.0]
    """

    pieces = True

    def __init__(self, strength: float = 10.0, silence: float = 0.8, shape: Shape = "linear", coupled: bool = False) -> None:
        if not (strength >= 0 and 0 <= silence < 1 and shape in ("linear", "constant")):
            raise RunError(f"Cage(strength={strength}, silence={silence}, shape={shape!r}): strength is 0 or more, silence a part of the run "
                           "below 1, the shape linear or constant")
        self.strength, self.silence, self.shape, self.coupled = strength, silence, shape, coupled

    def amount(self, step: int, steps: int) -> float:
        """Lambda of a step, counted from 0."""
        done = (step + 1) / steps
        if done <= self.silence:
            return 0.0
        risen = (done - self.silence) / (1 - self.silence)
        return self.strength * (round(risen, 12) if self.shape == "linear" else 1.0)

    @torch.no_grad()
    def grads(self, loop: Loop) -> None:
        amount = self.amount(loop.step, loop.steps)
        for weight, hard, _ in loop.quantized() if self.coupled and amount else ():
            if weight.grad is not None:
                weight.grad.add_(weight - hard, alpha=amount)

    @torch.no_grad()
    def after(self, loop: Loop) -> None:
        amount = self.amount(loop.step, loop.steps)
        for weight, hard, lr in loop.quantized() if not self.coupled and amount else ():
            if lr * amount >= 1:
                raise RunError(f"a pull of lr {lr:g} times lambda {amount:g} goes to the grid or beyond it in one step; take a strength well below "
                               f"{1 / lr:g}")
            weight.sub_(weight - hard, alpha=lr * amount)


def left(tactic: Cage, lr: float, schedule: Callable[[float], float], steps: int) -> float:
    """What a run leaves of a weight's way to a fixed grid point: the product of 1 - lr lambda_t.

    >>> round(left(Cage(10.0, 0.8), 1e-3, cosine(0.1, end=0.1), 1000), 2)
    0.89
    """
    return math.prod(1 - lr * schedule((step + 0.5) / steps) * tactic.amount(step, steps) for step in range(steps))


def cage(model: nn.Module, task: Task, *, bits: float = 4, input_bits: int | None = 4, strength: float = 10.0, silence: float = 0.8,
         shape: Shape = "linear", coupled: bool = False, base: Literal["quest", "lsq"] = "quest", hadamard: int | None = 128, scratch: bool = False,
         lr: float = 1e-3, scale_lr: float = 0.01, weight_decay: float = 0.1, warmup: float = 0.1, steps: int = 400) -> nn.Module:
    """Train all weights under QuEST's or LSQ's numbers, and draw them towards their grid in the last part of the run.

    Args:
        bits: bits of the weights: 1, 1.58 or 2 to 8 (lsq: not 1).
        input_bits: bits of the layers' inputs, 2 to 8, a fresh step a token; None leaves them in full precision.
        strength: lambda; 10 is for ten thousand steps and more, some hundred want 100 to 1,000. 0 is the base alone.
        silence: the part of the run before the pull begins.
        shape: linear rises to lambda until the end, constant has it at once.
        coupled: put the pull into the gradient, before the optimizer's moments, in place of behind the step.
        base: quest, or lsq for a learned step for each output channel.
        hadamard: channels that are rotated together, a power of two; None rotates nothing. No target holds a rotation.
        scratch: draw the weights anew, as the model's class does, in place of fine-tuning those that are there.
        lr: peak learning rate.
        scale_lr: peak learning rate of the steps, as a share of each step's own size (lsq).
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to a tenth follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits that the base does not speak of, a layer of odd width. FormatError: a target with a rotation.
        RunError: a strength, silence, shape or base that does not exist; a pull beyond the grid; scratch on a model that is not transformers'.
    """
    weight, inputs = numbers(base, bits, input_bits)
    pull = Cage(strength, silence, shape, coupled)
    transform = None if hadamard is None else Hadamard(most=hadamard)
    if scratch:
        renew(model, task.run.seed)
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight, input=inputs, transform=transform)], task)
    describe(model, task.probe()).check()
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), scale_share=scale_lr), schedule=cosine(warmup, end=0.1),
        steps=steps, tactics=[pull])
    return model


def numbers(base: str, bits: float, input_bits: int | None) -> tuple[Quant, Quant | None]:
    """Of weights and of inputs: QuEST's, gradients cut at the last level; or LSQ's."""
    if base == "quest":
        return gaussian(bits, PerChannel(), clip=1.0), None if input_bits is None else gaussian(input_bits, PerToken(), clip=1.0)
    if base != "lsq":
        raise RunError(f"base={base!r}: CAGE stands on quest or lsq")
    return Quant(signed(bits), PerChannel(), Learned(mean(bits)), Clip()), None if input_bits is None else of_input(input_bits, False)
