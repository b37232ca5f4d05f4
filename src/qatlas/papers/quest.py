"""QuEST: weights and activations of 1 to 4 bits, rotated until they look normal, trained where rounding can be trusted.

Andrei Panferov, Jiale Chen, Soroush Tabesh, Roberto L. Castro, Mahdi Nikdan, Dan Alistarh (ISTA, Red Hat AI), "QuEST: Stable Training of LLMs with
1-Bit Weights and Activations", ICML 2025, arXiv 2502.05003. Official code: IST-DASLab/QuEST; quantizers, constants, flags and recipe were checked in
it, numbers were held against its own (tests/test_golden.py).

A step from the largest value wastes levels on outliers, a learned step follows late, and both diverge when activations have few bits too. QuEST
learns no step. It rotates the inputs of a layer and the rows of its weight by the same Hadamard matrix H, in blocks of 128, which leaves the product
as it was, (x H)(w H)^T = x w^T, and makes each row near to normal. For a normal distribution the best even grid is known beforehand, in units of the
row's root mean square:

    z = x H                                                     rows of the weight, tokens of the input
    r = sqrt(mean z^2),    a = c r,    s = 2 a / (2^b - 1)      c: the clip of least squared error for N(0, 1) and 2^b even levels
    y = the nearest of the 2^b levels from -a to a              half-integers times s: there is no zero
    dx = (g M) H^T,        M = |y - z| <= T r                   trust: T = c / (2^b - 1), half a step

    b        1        1.58     2        3        4        5        6        7        8
    c        0.7979   1.2240   1.4935   2.0511   2.5139   2.9161   3.2766   3.6010   3.8849

Where rounding is off by more than half a step, which is beyond the last level only, the gradient is not believed: 0.7 % of normal values at 4 bits,
4.6 % at 2. r and a hear no gradient. The product's gradient is taken with the quantized partner.

At 1 bit half a step is too lenient: the published runs take the *clip* form there, M = |z| <= 1.30 a (1.25 without H), which blocks 30 %. So does
`clip=None` at 1 bit; `trust` and `clip` put either in its place at any bits, and `trust=inf` is the plain straight-through gradient.

The recipe of the authors: a Llama from scratch (`scratch`), 100 tokens a parameter, AdamW with betas 0.9 and 0.95 and a decay of 0.1, gradients cut
to norm 1, 10 % warm-up, then a cosine to a tenth of the rate; 1.2e-3 at 30 and 50 M parameters, half of it for each doubling from 100 M on. From a
checkpoint (their method, not their experiment) the rate is that of any fine-tuning.

Otherwise than the authors:
- 1.58 bits are the odd grid -a, 0, a. Their formula with b = 1.585 makes four levels. Their non-centred branch, whose lower clip lacks a division, is
  not here, nor are 4:8 sparsity and grids of uneven levels.
- H is exact: theirs is rounded to bf16 and shortens what it rotates back by 0.02 %.
- A layer whose width no 128 divides is rotated in the largest power of two that divides it, at most `hadamard`.
- A row of zeros becomes zeros (the smallest step), theirs +-1e-8. A value of exactly 0 becomes the upper of the two middle levels, theirs the lower.
- Decay reaches embeddings and head, as all matrices here; theirs spares them. The warm-up begins near 0, theirs at a hundredth of the rate.

An engine would have to rotate its activations, too: the rotation behind a nonlinearity folds into no neighbour, and no format that we write says it.
So a target is refused with `hadamard`; a packed directory holds the rotation and loads with it. Without it the half-integers of b bits are odd
integers times half a step: formats of b + 1 bits and more hold them (3 bits in gguf:q4_0, 4 in gguf:q8_0), one and 1.58 bits those of 2.

Numbers of ours: docs/results.md#quest. From a checkpoint of 260,000 parameters it is ahead of LSQ and largest-value steps at 4 to 1 bits; trust and
the clip form help, the rotation helps at 2 bits and not at 1.
"""

from __future__ import annotations

from torch import nn

from ..core.error import FormatError, QuantError
from ..core.estimator import Clip, Estimator, Trust
from ..core.grain import Grain, PerChannel, PerToken
from ..core.grid import Grid, HalfStep, Sign, Ternary
from ..core.quantizer import Quant
from ..core.scale import Rms
from ..core.transform import Hadamard
from ..model.coverage import describe
from ..model.fresh import renew
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Task

CLAIM = "Weights and activations of 1 to 4 bits train stably from scratch; W4A4 is the best quality for its bytes."
GAUSS = {1: 0.7978845587140913, 1.58: 1.2240089519030855, 2: 1.4935346200015913, 3: 2.051068354131873, 4: 2.513930578568423, 5: 2.9160938834961225,
         6: 3.276597282593217, 7: 3.6010497188221655, 8: 3.884938678807525}                        # c: the clip for N(0, 1), by bits
ONE_BIT = {True: 1.30, False: 1.25}                               # where the clip form cuts, in a: with and without the rotation


def quest(model: nn.Module, task: Task, *, bits: float = 4, input_bits: float | None = 4, hadamard: int | None = 128, trust: float | None = None,
          clip: float | None = None, scratch: bool = False, lr: float = 1e-3, weight_decay: float = 0.1, warmup: float = 0.1,
          steps: int = 400) -> nn.Module:
    """Train all weights under Gaussian steps and trusted gradients, from scratch or from where the model is.

    Args:
        bits: bits of the weights: 1, 1.58 or 2 to 8.
        input_bits: bits of the layers' inputs, likewise; None leaves them in full precision.
        hadamard: channels that are rotated together, a power of two; None rotates nothing. No target holds a rotation.
        trust: the rounding error up to which a gradient passes, in root mean squares of the row; None is half a step.
        clip: pass gradients up to so many times the last level, in place of trust; None is 1.3 at 1 bit (1.25 without the rotation), else trust.
        scratch: draw the weights anew, as the model's class does, in place of fine-tuning those that are there.
        lr: peak learning rate; from scratch the authors take 1.2e-3 at 30 M parameters.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to a tenth follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits, trust or clip that QuEST does not speak of, a layer of odd width. FormatError: a target with a rotation.
        RunError: scratch on a model that is not transformers'.
    """
    cut = ONE_BIT[hadamard is not None]
    weight = gaussian(bits, PerChannel(), trust, clip, cut)
    inputs = None if input_bits is None else gaussian(input_bits, PerToken(), trust, clip, cut)
    transform = None if hadamard is None else Hadamard(most=hadamard)
    if transform is not None and task.target:
        raise FormatError(f"hadamard={hadamard} and the target {task.target} do not go together: the rotation of a layer's inputs folds into no "
                          "neighbour behind a nonlinearity, and no file that we write says it. Train with hadamard=None (--hadamard null), or "
                          "without a target for the packed directory")
    if scratch:
        renew(model, task.run.seed)
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight, input=inputs, transform=transform)], task)
    describe(model, task.probe()).check()
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95)), schedule=cosine(warmup, end=0.1), steps=steps)
    return model


def gaussian(bits: float, grain: Grain, trust: float | None = None, clip: float | None = None, cut: float = ONE_BIT[True]) -> Quant:
    """All that is said about a tensor of so many bits, rotated already. `cut` is the clip at 1 bit where neither trust nor clip is given.

    >>> gaussian(2, PerToken()).estimator, gaussian(1, PerToken()).estimator
    (Trust(bound=0.5), Clip(margin=0.0, at=1.3))
    """
    if bits not in GAUSS:
        raise QuantError(f"QuEST takes 1, 1.58 or 2 to 8 whole bits, of weights (bits) and of inputs (input_bits), not {bits:g}")
    grid: Grid = Sign() if bits == 1 else Ternary() if bits == 1.58 else HalfStep(int(bits))
    step = GAUSS[bits] / grid.high                                # in root mean squares
    return Quant(grid, grain, Rms(step), believed(grid, step, trust, cut if bits == 1 and clip is None and trust is None else clip))


def believed(grid: Grid, step: float, trust: float | None, clip: float | None) -> Estimator:
    """Which gradients pass: the rounding error is at most `trust`, or the value at most `clip` times the last level; neither: half a step."""
    if trust is not None and clip is not None:
        raise QuantError(f"trust={trust:g} and clip={clip:g}: a gradient passes by one of the two; leave the other out")
    if min(trust or 0, clip or 0) < 0 or clip == 0:
        raise QuantError(f"trust={trust}, clip={clip}: trust is 0 or more, clip more than 0")
    if clip is not None:
        return Clip(at=clip * grid.high)
    return Trust((2 * grid.high / (grid.count - 1)) / 2 if trust is None else trust / step)
