"""FPQ: feature-perturbed quantization. Noise of one step on the inputs of a few layers, and a teacher heard channel by channel.

Junbiao Pang, Tianyang Cai, "Stabilizing Quantization-Aware Training by Implicit-Regularization on Hessian Matrix", 2025, arXiv 2503.11159. No
official code is public. Equations, algorithm, hyper-parameters and tables are the paper's; what it leaves open is an argument here, and the choice of
an independent re-implementation (RepnikovPavel/QAT) is named where we know it.

Quantization-aware training ends in sharp minima, where a small change of a layer's input moves the loss. So inputs are perturbed in training:

    SFP    with probability p, one draw for a layer and a forward:  x <- x + delta,    delta ~ U[-s/2, s/2] for each element,  s that input's step
           E L(x + delta) - L(x) = s^2 / 24 tr(d^2 L / dx^2) + ...:  the mean of the perturbed loss pays for curvature
           in all layers at once the noise below would bias the layers above: p is small, 0.1 (0.1 to 0.5 are as good, the paper says)
    CSD    sum over layers and channels of |z_T - z_S|^2,   z = (y - mean) / sqrt(var + eps) for each channel of a layer's output y,
           before norm and activation; T the full-precision model, on clean inputs
    loss = task(student with SFP) + CSD

Both are of training alone. They stand on any base that has a step: here LSQ's. Weights have one learned step a channel, inputs one a tensor
and an integer zero point that calibration finds and nothing moves afterwards (`asymmetric` gives weights one, too, as in the paper). With p = 0 and
csd = 0 this is the base, bit for bit.

What the paper leaves open:
- Noise before the input's quantizer (`where="before"`: the feature is perturbed, then rounded, as in dithering) or behind it.
- The step in the noise is a constant: delta is noise, and a step that heard it would learn from chance.
- CSD's size. The printed sum is huge; the re-implementation divides it by the batch. Here it is a mean over each layer's elements, summed over
  layers, so that it stands beside a cross entropy (`csd_mean=False`: the other).
- Statistics of a channel are over batch and pixels, or over batch and tokens, padding left out; eps = 1e-5.

Otherwise than the authors: AdamW and a cosine in place of SGD (0.01, momentum 0.9, decay 5e-4, 200 epochs). First and last layer are kept in full
precision by rules, where theirs have 8 bits. Their full-precision baselines are weak (ResNet-18: 88.7 % on CIFAR-10): take orderings, not levels.

Numbers of ours: docs/results.md#fpq.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.error import QuantError, RunError
from ..core.estimator import Clip
from ..core.grain import PerChannel, PerTensor
from ..core.grid import Uniform
from ..core.quantizer import Quant, Quantizer, working
from ..core.scale import AbsMean, Learned, MinMax
from ..layers.conv import QConv1d, QConv2d
from ..layers.quantized import Quantized
from ..model.coverage import describe
from ..model.quantized import quantized
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..model.taps import override, read
from ..train.fit import fit
from ..train.imitate import bare
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Batch, Task
from ..train.teacher import Once, Teacher

CLAIM = "Noise of one step on layer inputs finds flatter minima and beats learned steps (CIFAR-10, CIFAR-100)."
BITS = range(2, 9)
Noise = Literal["uniform", "gaussian"]
Where = Literal["before", "behind"]


def perturb(x: Tensor, quantizer: Quantizer, p: float, noise: Noise = "uniform") -> Tensor:
    """With probability p: x and noise of one step of its quantizer, uniform in +-s/2 or normal with the same variance s^2/12; else x itself."""
    if torch.rand(()) >= p:
        return x
    view = quantizer.quant.grain.view(working(x))
    with torch.no_grad():
        s = quantizer.place(view.detach()).s
        delta = (torch.rand_like(view) - 0.5) * s if noise == "uniform" else torch.randn_like(view) * (s / math.sqrt(12))
    return quantizer.quant.grain.back(view + delta, x.shape).to(x.dtype)


def apart(student: Tensor, teacher: Tensor, *, eps: float = 1e-5, mean: bool = True) -> Tensor:
    """CSD of one layer. student, teacher (channels, n): the mean over elements of the squared difference of standardised channels, or its sum.

    >>> x = torch.tensor([[1.0, 2.0, 4.0]])
    >>> bool(apart(3 * x - 5, x) < 1e-9)
    True
    """
    off = (_standard(student, eps) - _standard(teacher, eps)).square()
    return off.mean() if mean else off.sum()


def _standard(y: Tensor, eps: float) -> Tensor:
    y = y.float()
    return (y - y.mean(1, keepdim=True)) * (y.var(1, correction=0, keepdim=True) + eps).rsqrt()


def channels(y: Tensor, first: bool, mask: Tensor | None = None) -> Tensor:
    """An output -> (channels, n). first: channels lie at place 1 (convolutions), else last. mask (batch, tokens): what is real."""
    if first:
        return y.transpose(0, 1).flatten(1)
    return (y[mask.bool().to(y.device)] if mask is not None and mask.shape == y.shape[:2] else y.flatten(0, -2)).T


class Perturbed:
    """A loss for `fit`: the task's under SFP, and `csd` times CSD. p: of a layer; where: before or behind the input's quantizer."""

    def __init__(self, task: Task, student: nn.Module, teacher: Teacher | None, *, p: float = 0.1, csd: float = 1.0, noise: Noise = "uniform",
                 where: Where = "before", mean: bool = True) -> None:
        self.task, self.teacher, self.p, self.csd, self.noise, self.where, self.mean = task, teacher, p, csd, noise, where, mean
        layers = {name: layer for name, layer in quantized(student).items() if layer.weight_quantizer is not None}
        self._acts: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, layer in layers.items():
            if p and layer.input_quantizer is not None:
                address = f"{name}:input" if where == "before" else f"{name}.input_quantizer:output"
                self._acts[address] = partial(perturb, quantizer=layer.input_quantizer, p=p, noise=noise)
        self._first = {f"{name}:output": _channels_first(layer) for name, layer in layers.items()} if csd else {}
        if p and not self._acts:
            raise RunError(f"p={p} perturbs inputs by their steps, and no layer has a quantized input: give input_bits, or p=0")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        inner = bare(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(override(inner, self._acts))
            ours: dict[str, Any] = stack.enter_context(read(inner, self._first))
            kept = Once(self.task.logits(model, batch))
            found = dict(ours)
        value = self.task.loss(kept, batch)
        if not self.csd or self.teacher is None:
            return value
        theirs, mask = self.teacher.signals(self.task, batch, self._first)[1], batch.get("attention_mask")
        terms = [apart(channels(y, first, mask), channels(theirs[at], first, mask), mean=self.mean)
                 for (at, first), y in zip(self._first.items(), found.values(), strict=True)]
        return value + self.csd / (1 if self.mean else len(kept.logits)) * torch.stack(terms).sum()


def _channels_first(layer: Quantized) -> bool:
    return isinstance(layer, QConv1d | QConv2d)


def fpq(model: nn.Module, task: Task, *, bits: int = 4, input_bits: int | None = 4, p: float = 0.1, csd: float = 1.0, noise: Noise = "uniform",
        where: Where = "before", csd_mean: bool = True, asymmetric: bool = False, lr: float = 3e-4, scale_lr: float = 0.01,
        weight_decay: float = 0.0, warmup: float = 0.05, steps: int = 400) -> nn.Module:
    """Fine-tune all weights and steps under perturbed inputs, taught layer by layer by the full-precision model.

    Args:
        bits: bits of the weights, 2 to 8.
        input_bits: bits of the layers' inputs, 2 to 8, one learned step a tensor; None leaves them in full precision (then p must be 0).
        p: probability that a layer's input is perturbed in a forward; 0 perturbs none.
        csd: weight of the channel-wise distillation; 0 asks no teacher.
        noise: uniform within half a step, or gaussian with the same variance.
        where: before or behind the input's quantizer.
        csd_mean: a mean over each layer's elements in place of a sum over all, for each sample.
        asymmetric: unsigned weights with an integer zero point that stays, as in the paper; few targets hold it.
        lr: peak learning rate of the weights.
        scale_lr: peak learning rate of the steps, as a share of each step's own size.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits outside of 2 to 8. RunError: a p, csd, noise or place of it that does not exist; p without quantized inputs.
    """
    weight, inputs = of_weight(bits, asymmetric), None if input_bits is None else of_input(input_bits)
    if not (0 <= p <= 1 and csd >= 0 and noise in ("uniform", "gaussian") and where in ("before", "behind")):
        raise RunError(f"p={p}, csd={csd}, noise={noise!r}, where={where!r}: p is a probability, csd 0 or more, noise uniform or gaussian, its place "
                       "before or behind")
    if p and input_bits is None:
        raise RunError(f"p={p} perturbs inputs by their steps, and input_bits=None leaves them without: give input_bits, or p=0")
    teacher = Teacher.of(model) if csd else None
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight, input=inputs)], task)
    describe(model, task.probe()).check()
    moving = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.endswith("_quantizer.zero")]
    loss = Perturbed(task, model, teacher, p=p, csd=csd, noise=noise, where=where, mean=csd_mean) if p or csd else None
    fit(model, task, train=moving, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps,
        loss=loss)
    return model


def of_weight(bits: int, asymmetric: bool = False) -> Quant:
    """Of a weight: one learned step for each output channel, around 0 or around a zero point."""
    if bits not in BITS:
        raise QuantError(f"FPQ takes weights of 2 to 8 whole bits, not bits={bits!r}")
    if asymmetric:
        return Quant(Uniform(bits, False), PerChannel(), Learned(MinMax()), Clip())
    return Quant(Uniform(bits), PerChannel(), Learned(AbsMean(2.0, per_root=True)), Clip())


def of_input(bits: int) -> Quant:
    """Of a layer's input: one learned step and a zero point for all of it."""
    if bits not in BITS:
        raise QuantError(f"FPQ takes inputs of 2 to 8 whole bits, not input_bits={bits!r}")
    return Quant(Uniform(bits, False), PerTensor(), Learned(MinMax(), over="token"), Clip())
