"""ParetoQ: the right grid for each of 1, 1.58, 2, 3 and 4 bits.

Zechun Liu et al. (Meta), NeurIPS 2025, arXiv 2502.02631. Official code: facebookresearch/ParetoQ. Grids, starts, gradients and the example recipe
were checked in it; budgets and learning rates by bits are the paper's as remembered.

Bit-widths can only be compared when each has the grid that suits it. Few integers suit badly: at 2 bits -2, -1, 0, 1 is lopsided. *Stretched
elastic quantization* (SEQ) cuts the range of a learned clip value alpha into equal bins and stands for each by its middle, so that the levels are
balanced and lie inside the range. One bit is the sign times a learned alpha, 3 and 4 bits are LSQ's integers:

    bits    values                              alpha starts at
    1       alpha * (-1, 1)                     mean|w|
    1.58    alpha * (-2/3, 0, 2/3)              max|w|
    2       alpha * (-3/4, -1/4, 1/4, 3/4)      max|w|
    3, 4    alpha * (-2^(b-1) ... 2^(b-1) - 1)  max|w| / Qp

    SEQ     q = (round(clip(v, -0.99, 0.99) n - shift) + shift) / n,  v = w / alpha,  n = levels / 2,  shift = 1/2 (an odd number of levels: 0)
    dw      = g inside, else 0                  inside: |v| <= 0.99 with SEQ, the ends of the grid with LSQ, |v| <= 1 at 1 bit
    dalpha  = gamma * sum g * (q - v inside, the end of the grid outside; at 1 bit the sign),     gamma = 1 / sqrt(Qp * elements of the whole matrix)

Qp is 1 at 1, 1.58 and 2 bits, 3 at 3 and 7 at 4. Weights only, one alpha an output channel, all trained together from a full-precision checkpoint
on plain cross entropy: AdamW without decay, no warm-up, a cosine to zero, one learning rate for weights and alphas. The paper's claims: about a
tenth of all tokens is the best share for this phase; at 3 and 4 bits weights stay near where they were, at 2 and below they move far and are
learned anew.

Its learning rate of 2e-5 is for 120,000 steps (1, 1.58 and 2 bits; 1e-5 and 40,000 steps at 3 and 4). Runs of some hundred steps want 3e-4 to 1e-3,
and `scale_lr`, since Adam moves each number by its learning rate, however small the number is. With the start at max|w| most ternary weights begin
as zeros: early losses say nothing.

Otherwise than the authors:
- A binary weight of exactly 0 becomes +alpha; their sign(0) = 0 is a third value, which no binary format can store.
- 1.58 bits are -1, 0, 1 times a learned step s = 2/3 alpha, which starts at 2/3 max|w|; inside is |w / s| <= 3/2 0.99. Values, thresholds and
  gradients are the same (ds = 3/2 dalpha), but a format stores a step, and 2/3 is no binary fraction. With a learning rate in units of one, s moves
  1.5 times as fast, relative to its size, as alpha would.
- Outside of the ternary range alpha hears 2/3, by which the value moves with it; their code says 1 there.
- Biases of linear layers stay; theirs have none. `distil`, `warmup`, `group` and other grids at the same bits are for comparisons.

A target keeps the grid that is trained, or refuses it by name; steps are rounded to the target's type in each forward. gguf:q4_0 and gguf:q8_0 hold
the 2 bits as alpha / 4 times -3, -1, 1, 3, in the 4 or 8 bits that their codes have; gguf:tq2_0 holds 1.58 and 1 bits, not 2.

Numbers of ours: docs/results.md#paretoq.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..core.error import QuantError
from ..core.estimator import Clip
from ..core.grain import Grain, Group, PerChannel
from ..core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax, AbsMean, Learned
from ..model.coverage import describe
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Task
from ..train.teacher import Distil, Teacher

CLAIM = "With the right grid for each width 2, 1.58 and 3 bits lie on the front of size against accuracy; weights move far below 3 bits."
Levels = Literal["stretched", "integer", "half"]
GRIDS: dict[float, tuple[Levels, ...]] = {1: (), 1.58: ("stretched", "integer"), 2: ("stretched", "integer", "half"),
                                          3: ("integer", "stretched", "half"), 4: ("integer", "stretched", "half")}      # the paper's first
FLOOR = 1e-5                                                      # of alpha
TWO_THIRDS = 2 / 3                                                # a ternary step, in alphas


def paretoq(model: nn.Module, task: Task, *, bits: float = 2, grid: Levels | None = None, group: int | None = None, distil: bool = False,
            lr: float = 2e-5, scale_lr: float | None = None, warmup: float = 0.0, steps: int = 1000) -> nn.Module:
    """Fine-tune all weights and their scales, each number of bits on its own grid.

    Args:
        bits: bits of the weights: 1, 1.58, 2, 3 or 4.
        grid: stretched (SEQ), integer (LSQ's) or half (half-integers with LSQ's learned step); None is the paper's for these bits.
        group: inputs that share a scale; None is one scale for each output channel.
        distil: learn from the full-precision model's logits in place of the labels; the paper does not.
        lr: peak learning rate of the weights; 2e-5 is for the paper's 120,000 steps, some hundred steps want 3e-4 to 1e-3.
        scale_lr: peak learning rate of the scales, as a share of each scale's own size; None is lr itself in units of one, as the authors have it.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits, or a grid at these bits, that ParetoQ does not speak of.
    """
    weight = of_weight(bits, grid, PerChannel() if group is None else Group(group))
    teacher = Teacher.of(model) if distil else None
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight)], task)
    describe(model, task.probe()).check()
    fit(model, task, optimizer=AdamW(lr=lr, scale_share=scale_lr), schedule=cosine(warmup), steps=steps,
        loss=Distil(task, teacher) if teacher is not None else None)
    return model


def of_weight(bits: float, grid: Levels | None = None, grain: Grain | None = None) -> Quant:
    """All that is said about a weight of so many bits.

    >>> of_weight(2).grid, of_weight(3).grid
    (Stretched(levels=4, clip=0.99), Uniform(bits=3, signed=True, narrow=False))
    """
    if bits not in GRIDS:
        raise QuantError(f"ParetoQ takes weights of 1, 1.58, 2, 3 or 4 bits, not bits={bits:g}")
    if grid is not None and grid not in GRIDS[bits]:
        raise QuantError(f"ParetoQ at {bits:g} bits has no grid {grid!r}: " + (f"take {' or '.join(GRIDS[bits])}" if GRIDS[bits] else
                         "one bit has a single set of values, leave grid out"))
    grain = PerChannel() if grain is None else grain
    learned = Learned(AbsMax(), over="tensor", floor=FLOOR)
    if bits == 1:
        return Quant(Sign(), grain, learned.but(start=AbsMean(), gradient="value"), Clip())
    kind = grid or GRIDS[bits][0]
    if kind == "half":
        return Quant(HalfStep(int(bits)), grain, learned, Clip())
    if kind == "integer":
        return Quant(Ternary() if bits == 1.58 else Uniform(int(bits)), grain, learned, Clip())
    if bits == 1.58:
        return stretched_ternary(grain)
    return Quant(Stretched(2 ** int(bits)), grain, learned.but(start=AbsMax(reach=1.0)), Clip())


def stretched_ternary(grain: Grain) -> Quant:
    """Stretched(3) in units of its step: u = w / s = 3/2 v."""
    beyond = Stretched(3).clip / TWO_THIRDS - Ternary().high      # how far the clip lies outside of the last level
    learned = Learned(AbsMax(reach=1 / TWO_THIRDS), over="tensor", margin=beyond, floor=FLOOR * TWO_THIRDS)
    return Quant(Ternary(), grain, learned, Clip(beyond))
