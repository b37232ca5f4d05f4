"""StableQAT: weights on a level rest, weights at a threshold move.

Tianyi Chen, Sihan Chen, Xiaoyi Qu, Dan Zhao, Ruomei Yan, Jongwoo Ko, Luming Liang, Pashmina Cameron (Microsoft), "StableQAT: Stable
Quantization-Aware Training at Ultra-Low Bitwidths", 2026, arXiv 2601.19320. Official code: microsoft/StableQAT. Quantizer, starts and configurations
were checked in it, numbers were held against its own (tests/test_golden.py); the release lacks its optimizer and does not run as it is.

The straight-through gradient treats rounding as the identity and does not see the stairs. Soft stairs (DSQ) do, but their slope grows without bound
as they sharpen. Turn the graph of round() by 45 degrees: it becomes a triangle wave, t = (x + x_q) / sqrt 2 along, f = (x_q - x) / sqrt 2 across.
The first terms of its Fourier series, damped, turned back, give a slope that is bounded and costs a cosine. It stands in the backward pass only:

    forward   LSQ: x = w / s,  x_q = round(x),  w_hat = s clip(x_q, Qn, Qp)
    rho       = 2 / (1 + sqrt 2 pi S) - 1,     S = sum_m A_m cos((2 m + 1) pi (x + x_q)),     A_m = A (-1)^m / (2 m + 1)
    dw        = g rho inside the clip range, else 0
    ds        = as LSQ: it hears nothing of rho

With one term and A = 0.21, the authors' default, rho is 1 at each rounding threshold and falls to 0.035 at each level: a weight that lies on its
level hardly moves, one that is about to change does, and the mean slope is 0.30. A = 0 is rho = 1, which is LSQ. The series' own amplitude is
2 sqrt 2 / pi^2 = 0.2866; beyond 1 / (sqrt 2 pi) = 0.2251 the slope at levels is negative, and we refuse it. With SGD the mean slope asks for
another learning rate; Adam divides it away, and what remains is the shape.

The rest is ParetoQ's code base, which the authors build on, with LSQ's integers at all bits (2 bits: -2, -1, 0, 1): one step an output channel,
weights only, all trained together from a checkpoint on plain cross entropy, AdamW without decay, a cosine to zero; 1e-4 (2e-4 at 3 bits on Qwen3) for
10 to 30 billion tokens. Steps start at max|w| / Qp, which is max|w| at 2 bits; the authors' remark that their LSQ is weaker there than ParetoQ's
own 2 bits is ours too: compare with `paretoq`.

Otherwise than the authors:
- The factor (-1)^m / (2 m + 1) is built in (`terms`); their code takes a free list, to which [A, -A / 3] must be given for two terms.
- One bit is left out. Their code rounds w / s to integers for rho there while the forward takes the sign, so that rho is smallest at the threshold
  of the sign and largest at half of a level, the contrary of what it is for. `paretoq` has one bit.
- Biases of linear layers stay; theirs have none. Rates for some hundred steps: as in ParetoQ's file.

Numbers of ours: docs/results.md#stableqat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.estimator import Estimator
from ..core.grain import Grain, Group, PerChannel
from ..core.grid import Grid
from ..core.quantizer import Quant
from ..model.coverage import describe
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Task
from .paretoq import of_weight as paretoq_weight

CLAIM = "Better and steadier than learned steps with a straight-through gradient at 2 to 4 bits, for the same cost."
ROOT = math.sqrt(2) * math.pi
HIGHEST = 1 / ROOT                                                # above it weights on a level run against the gradient


@dataclass(frozen=True)
class Fourier(Estimator):
    """dx = g rho(u) inside the grid's reach, else 0. amplitudes: A_0, A_1, ... as they stand in the sum, signs and all; none, or zeros: `Clip()`.

    >>> Fourier((0.21,)).rho(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    tensor([0.0347, 0.2050, 1.0000, 0.0347])
    """

    amplitudes: tuple[float, ...] = (0.21,)

    def __call__(self, g: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return g * (self.rho(u) * grid.inside(u))

    def rho(self, u: Tensor) -> Tensor:
        """The slope at a place. cos((2 m + 1) pi (u + round u)) is that of u - round u, for 2 round u is even; the latter loses no digits."""
        off = (u - u.round()) * math.pi
        total = torch.zeros_like(u)
        for m, amplitude in enumerate(self.amplitudes):
            total += amplitude * torch.cos((2 * m + 1) * off)
        return 2 / (1 + ROOT * total) - 1


def stableqat(model: nn.Module, task: Task, *, bits: float = 3, amplitude: float = 0.21, terms: int = 1, group: int | None = None, lr: float = 1e-4,
              scale_lr: float | None = None, warmup: float = 0.0, steps: int = 1000) -> nn.Module:
    """Fine-tune all weights and their steps, weights by the slope of a damped triangle wave.

    Args:
        bits: bits of the weights: 1.58, 2, 3 or 4.
        amplitude: A of the wave, 0 (LSQ) to 0.225.
        terms: terms of its Fourier series.
        group: inputs that share a step; None is one step for each output channel.
        lr: peak learning rate of the weights; 1e-4 is for the paper's billions of tokens, some hundred steps want 3e-4 to 1e-3.
        scale_lr: peak learning rate of the steps, as a share of each step's own size; None is lr itself in units of one, as the authors have it.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits, an amplitude or terms that StableQAT does not speak of.
    """
    weight = of_weight(bits, amplitude, terms, PerChannel() if group is None else Group(group))
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight)], task)
    describe(model, task.probe()).check()
    fit(model, task, optimizer=AdamW(lr=lr, scale_share=scale_lr), schedule=cosine(warmup), steps=steps)
    return model


def of_weight(bits: float, amplitude: float = 0.21, terms: int = 1, grain: Grain | None = None) -> Quant:
    """All that is said about a weight of so many bits: the integers and the learned step of ParetoQ's code, and the wave.

    >>> of_weight(2).grid, of_weight(2).estimator
    (Uniform(bits=2, signed=True, narrow=False), Fourier(amplitudes=(0.21,)))
    """
    if bits not in (1.58, 2, 3, 4):
        raise QuantError(f"StableQAT takes weights of 1.58, 2, 3 or 4 bits, not bits={bits:g}" + (": one bit is ParetoQ's" if bits == 1 else ""))
    if not 0 <= amplitude <= HIGHEST:
        raise QuantError(f"amplitude={amplitude:g}: from 0, which is LSQ, to {HIGHEST:.4f}; beyond it weights on a level run against the gradient")
    if terms < 1:
        raise QuantError(f"terms={terms}: at least one; amplitude=0 is LSQ")
    wave = Fourier(tuple(amplitude * (-1) ** m / (2 * m + 1) for m in range(terms)))
    return paretoq_weight(bits, "integer", grain).but(estimator=wave)
