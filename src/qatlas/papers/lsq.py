"""LSQ: learned step size quantization.

Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani, Rathinakumar Appuswamy, Dharmendra S. Modha, ICLR 2020, arXiv 1902.08153. No official code is
public; gradients and scaling were held against MQBench's and OFQ's, the training recipe is the paper's as remembered.

The step of the grid is a parameter like any other, and it hears how far the values are from where they were rounded to:

    y  = s * round(clip(x / s, -Qn, Qp))
    dx = g inside the clip range, else 0
    ds = gamma * sum g * (round(u) - u inside; -Qn below; Qp above),      u = x / s, gamma = 1 / sqrt(N * Qp)

N is the number of weights that share a step; for an activation, the features of one token or pixel, so that the step's learning rate does not
depend on the batch. A step starts at 2 mean|x| / sqrt(Qp): weights from themselves, activations from a calibration batch (not from the first training
batch, so that several processes start alike and a resumed run does not start again).

Otherwise than the paper: AdamW and a cosine in place of SGD, since our models are transformers. With Adam gamma is divided away, so what counts is
`scale_lr`, which is a share of each step's own size (the step of 8 bits is a hundredth of its weights, and Adam with their rate would lose it);
weight decay never reaches a step. Activations are quantized per token with a fresh absmax step in language models, which follows their
outliers (`static=True` learns one step a tensor as in the paper; encoders and vision). Embeddings, head and classifier stay in full precision unless
a rule says otherwise; the paper puts first and last layer at 8 bits. 1.58 bits is LSQ on -1, 0, 1 with the step started from mean|w|. With `distil`
the loss is the divergence from the full-precision model's logits in place of the labels' cross entropy (the paper reports a gain from distillation
in its section 3.7).

Numbers of ours: docs/results.md#lsq.
"""

from __future__ import annotations

from torch import nn

from ..core.error import QuantError, RunError
from ..core.estimator import Clip
from ..core.grain import Grain, Group, PerChannel, PerTensor, PerToken
from ..core.grid import Grid, Ternary, Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax, AbsMean, Learned
from ..model.coverage import describe
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.cached import cached
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Task
from ..train.teacher import Distil, Teacher

CLAIM = "Steps that learn where to lie reach the accuracy of full precision at 3 and 4 bits (ResNet, ImageNet)."
WHOLE = range(2, 9)                                               # at 1 bit the integers are -1 and 0: no grid of weights


def lsq(model: nn.Module, task: Task, *, bits: float = 4, input_bits: int | None = None, group: int | None = None, static: bool = False,
        distil: bool = False, teacher_cache: str | None = None, lr: float = 3e-4, scale_lr: float = 0.01, weight_decay: float = 0.0,
        warmup: float = 0.05, steps: int = 400) -> nn.Module:
    """Fine-tune all weights and their steps.

    Args:
        bits: bits of the weights, 1.58 or 2 to 8.
        input_bits: bits of the layers' inputs, 2 to 8; None leaves them in full precision.
        group: inputs that share a weight's step; None is one step for each output channel.
        static: learn one step for each input tensor (encoders, vision) in place of a fresh one for each token.
        distil: learn from the full-precision model's logits in place of the labels.
        teacher_cache: a directory that keeps what the teacher says; it is asked once for each sample, then read. Only with distil.
        lr: peak learning rate of the weights.
        scale_lr: peak learning rate of the steps, as a share of each step's own size.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits that LSQ does not speak of. RunError: a teacher_cache without a teacher.
    """
    if teacher_cache is not None and not distil:
        raise RunError(f"teacher_cache={teacher_cache!r} without distil learns from the labels and asks no teacher; say distil=True (--distil), "
                       "or leave teacher_cache out")
    grain: Grain = PerChannel() if group is None else Group(group)
    weight = Quant(signed(bits), grain, Learned(mean(bits)), Clip())
    inputs = None if input_bits is None else of_input(input_bits, static)
    teacher = Teacher.of(model) if distil else None
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight, input=inputs)], task)
    describe(model, task.probe()).check()
    loss = Distil(task, cached(teacher_cache, teacher, task, steps)) if teacher is not None else None
    del teacher                                                   # a cached one has done its work: its memory is free
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps, loss=loss)
    return model


def signed(bits: float) -> Grid:
    """The grid of so many bits: ternary, or integers."""
    if bits != 1.58 and bits not in WHOLE:
        raise QuantError(f"LSQ takes weights of 1.58 or of 2 to 8 whole bits, not bits={bits:g}")
    return Ternary() if bits == 1.58 else Uniform(int(bits))


def mean(bits: float) -> AbsMean:
    """Where a weight's step starts: mean|w| of ternary weights, 2 mean|w| / sqrt(Qp) of integers."""
    return AbsMean(1.0) if bits == 1.58 else AbsMean(2.0, per_root=True)


def of_input(bits: int, static: bool) -> Quant:
    """Of a layer's input: a fresh step a token, or a learned one a tensor, its signedness decided by calibration."""
    if bits not in WHOLE:
        raise QuantError(f"LSQ takes inputs of 2 to 8 whole bits, not input_bits={bits:g}")
    if not static:
        return Quant(Uniform(bits), PerToken(), AbsMax())
    return Quant(Uniform(bits, None), PerTensor(), Learned(AbsMean(2.0, per_root=True), over="token"), Clip())
