"""Oscillations: weights driven to the edges of their bins, which is what quantized training is said to give.

Jonathan Wenshoj, Bob Pepin, Raghavendra Selvan, "Oscillations Make Neural Networks Robust to Quantization", TMLR 2025, arXiv 2502.00490. Official
code: saintslab/osc_reg. The regulariser was checked in their code; recipes are partly from summaries of the paper. The opposite view, that
oscillations have to be overcome, is papers/overcoming_oscillations.py.

Take one weight and one input. With q the nearest level, the straight-through gradient of a quantized model is

    d/dw L(q(w)) = d/dw L(w) + E[x^2] (q(w) - w)

that of full precision and a second term. A step of descent along the second pushes w away from its level, towards the edge of the bin; beyond the
edge it pushes back: the weight oscillates. The paper says that this is what quantization-aware training has to give. It adds only that term to
training in full precision, and rounds once, at the end:

    L + lambda R,    R = sum_layers mean(q^2 - w^2)          gradient of R:  (2 / n) (q - w),  n weights in the layer

There is one step for each matrix, s = max|w| / (2^(b-1) - 1), measured anew (2 bits are -1, 0, 1). It hears R as well: the authors do not detach it,
so the largest weight of a layer gets a gradient for all others (`detach` takes it away). Of weights only. The mean over each layer makes lambda / n
what acts on a weight: a search is for one model and one number of bits. Lambda 0 is training in full precision, bit for bit.

Otherwise than the authors:
- R is over the layers that the rules quantize; their code takes every module with a `weight`, so norms too unless they are excluded by name.
- A target (gguf:q4_0, ...) rounds the step to its type, in R as well.
- No early stopping by the score of the rounded model: the last state is kept. AdamW and a cosine.
- Lambda is ours, for layers of some thousand weights; theirs is searched for each model.

Numbers of ours: docs/results.md#oscillations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.error import QuantError, RunError
from ..core.estimator import Ste
from ..core.grain import PerTensor
from ..core.grid import Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax
from ..model.coverage import describe
from ..model.places import lit, weights
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.imitate import bare
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Batch, Task
from ..train.teacher import full_precision

CLAIM = "Training in full precision with oscillations induced, rounded once at the end, recovers what quantized training reaches, from 3 bits on."


def inducing(model: nn.Module) -> Tensor:
    """R: the sum over the weights of mean(q^2 - w^2), also where quantizers are off."""
    terms = []
    for quantizer, w in weights(model):
        with lit(quantizer):
            terms.append((quantizer(w).square() - w.square()).mean())
    return torch.stack(terms).sum()


class Inducing:
    """A loss for `fit`: the task's, and `strength` times R. Strength 0 is the task's, bit for bit."""

    def __init__(self, task: Task, strength: float) -> None:
        self.task, self.strength = task, strength

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.task.loss(model, batch)
        return value + self.strength * inducing(bare(model)) if self.strength else value


def oscillations(model: nn.Module, task: Task, *, bits: int = 3, strength: float = 300.0, detach: bool = False, lr: float = 1e-3,
                 weight_decay: float = 0.0, warmup: float = 0.05, steps: int = 400) -> nn.Module:
    """Train in full precision with oscillations induced, then round.

    Args:
        bits: bits of the weights, 2 to 8.
        strength: lambda; 300 is for layers of some thousand weights, larger ones want more: search. 0 is plain training, rounded at its end.
        detach: the step does not hear the regulariser.
        lr: peak learning rate.
        weight_decay: of matrices only; it fights the regulariser.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits outside of 2 to 8. RunError: a strength below 0.
    """
    if strength < 0:
        raise RunError(f"strength={strength}: lambda is 0 or more")
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=of_weight(bits, detach))], task)
    describe(model, task.probe()).check()
    with full_precision(model):
        fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay), schedule=cosine(warmup), steps=steps, loss=Inducing(task, strength))
    return model


def of_weight(bits: int, detach: bool = False) -> Quant:
    """Of a weight: a fresh step for each matrix, with a gradient or without."""
    if bits not in range(2, 9):
        raise QuantError(f"oscillations are of weights of 2 to 8 whole bits, not bits={bits!r}")
    return Quant(Uniform(bits, narrow=True), PerTensor(), AbsMax(gradient="none" if detach else "statistic"), Ste())
