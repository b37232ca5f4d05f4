"""TernaryBERT: ternary weights by distillation of every layer.

Wei Zhang, Lu Hou, Yichun Yin, Lifeng Shang, Xiao Chen, Xin Jiang, Qun Liu, EMNLP 2020, arXiv 2009.12812. Official code: Huawei's
Pretrained-Language-Model/TernaryBERT; numbers and losses were held against it (tests/test_golden.py). LAT is not in that code: it is written
after "Loss-aware weight quantization of deep networks" (Hou and Kwok, 2018, arXiv 1802.08635), partly from memory.

A fine-tuned transformer's weights become alpha b with b in {-1, 0, 1}, its activations 8-bit integers. Rounding alone destroys it, so the student,
which starts from the full-precision model, imitates that model layer by layer:

    L = CE(z^S, softmax z^T) + sum_l MSE(H^S_l, H^T_l) + sum_l MSE(A^S_l, A^T_l)

z logits, H_l the hidden states (what enters the first block, and what leaves each), A_l the attention scores before the softmax, 0 on both sides
where the mask hides them. All weigh 1, no label is asked for.

    TWN   b = sign(w) [|w| > 0.7 mean|w|],  alpha the mean of the |w| that survive: the least-squares step of w on b: Ternary(0.7), AbsMean, refit
    LAT   min sum_i d_i (alpha b_i - w_i)^2 with d the root of Adam's second moment, alpha and b in turn from TWN's alpha:
          alpha = sum d |b w| / sum d |b|,   b = sign(w) [|w| > alpha / 2]

One alpha a matrix (a row with `rows`), one a row of the word embedding. Weights and activations are cut to +-2.5 first, and hear no gradient beyond.
Quantized: the inputs of the layers, and query, key, probabilities and value inside attention, each with its own largest value as scale, measured anew
in every forward. Full precision: position and type embeddings, norms, biases, the classifier.

Otherwise than the authors:
- Their prediction loss is divided by the number of classes (`class_mean`); the paper's, and Teacher Intervention's, is not.
- Decoders quantize per token, since one scale a tensor would let a later token change an earlier one. An embedding that is also the head stays full.
- An all-zero row gives zeros; their code gives 0 / 0. Their export ternarizes the embedding by one alpha; ours exports what was trained.
- A patch projection of a vision model counts as an embedding of positions: full precision.
- The learning rate of a step is that of its middle (theirs of its beginning: their first step does nothing).
- The last state is kept, theirs is the best on the development set. Their data augmentation is a hook: `Classification(augment=...)`.

Numbers of ours: docs/results.md#teacher-intervention (it is the baseline there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import RuleError
from ..core.estimator import bounded
from ..core.grain import Grain, PerChannel, PerTensor, PerToken
from ..core.grid import Grid, Ternary, Uniform
from ..core.place import Place
from ..core.quantizer import Quant, Quantizer
from ..core.scale import AbsMax, AbsMean, MinMax, Scale
from ..model.coverage import describe
from ..model.roles import Role, ask
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit, widen
from ..train.imitate import Imitation, teacher_for
from ..train.optim import AdamW, BertAdam, Optimizer
from ..train.ranks import whole
from ..train.schedule import linear
from ..train.tactic import Loop, Tactic
from ..train.task import Task

CLAIM = "Distillation of every layer brings ternary weights with 8-bit activations near full precision, at a fifteenth of the size."


@dataclass(frozen=True)
class LossAware(Scale):
    """LAT's alpha: `turns` times alpha and b in turn, from TWN's alpha. Each turn lowers sum d (alpha b - w)^2, b with the threshold alpha / 2."""

    turns: int = 5

    def measure(self, x: Tensor, grid: Grid) -> Place:
        return self.weighted(x, torch.ones_like(x))

    def weighted(self, x: Tensor, curvature: Tensor) -> Place:
        """x, curvature (..., n), positive -> alpha (..., 1)."""
        size = x.abs()
        alpha = _mean(size, size > 0.7 * size.mean(-1, keepdim=True))
        for _ in range(self.turns):
            alpha = _mean(size, curvature * (size > alpha / 2))
        return Place(alpha)


def _mean(size: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over the last axis; 0 where nothing weighs."""
    total = weight.sum(-1, keepdim=True)
    return (size * weight).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class Lat(Quant):
    """A Quant whose scale is LossAware and hears the curvature of each weight."""

    grid: Grid = Ternary()
    scale: Scale = LossAware()

    def build(self) -> Quantizer:
        return Curved(self)


class Curved(Quantizer):
    """A Quantizer with one curvature a weight, all ones until `Curvature` tells it others."""

    curvature: Tensor | None

    def __init__(self, quant: Quant) -> None:
        super().__init__(quant)
        self.register_buffer("curvature", None)

    @torch.no_grad()
    def place(self, view: Tensor) -> Place:
        x = bounded(view.detach(), self.quant.clip)
        scale: Any = self.quant.scale
        return scale.measure(x, self.quant.grid) if self.curvature is None else scale.weighted(x, self.quant.grain.view(self.curvature))


class Curvature(Tactic):
    """Before each step, tell every loss-aware quantizer the root of the optimizer's second moment (ones before the first step)."""

    pieces = True

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    @classmethod
    def idle(cls) -> Curvature:
        """In a model without loss-aware quantizers it does nothing."""
        return cls()

    def start(self, loop: Loop) -> None:
        for layer, quantizer in self._curved(loop):
            quantizer.curvature = torch.ones_like(layer.matrix())

    @torch.no_grad()
    def before(self, loop: Loop) -> None:
        for layer, quantizer in self._curved(loop):
            square = loop.optimizer.state.get(layer.weight, {}).get("exp_avg_sq")
            if square is not None:
                quantizer.curvature = layer.unmatrix(whole(square)).sqrt() + self.eps
                layer.refresh()

    def _curved(self, loop: Loop) -> list[tuple[Any, Curved]]:
        return [(layer, q) for _, layer in loop.layers() if isinstance(q := layer.weight_quantizer, Curved)]


def ternarybert(model: nn.Module, task: Task, *, logits: float = 1.0, hidden: float = 1.0, scores: float = 1.0, class_mean: bool = False,
                teacher: str | None = None, adamw: bool = False, lr: float = 2e-5, weight_decay: float = 0.01, warmup: float = 0.1,
                steps: int = 600, loss_aware: bool = False, rows: bool = False, embeddings: bool | None = None, input_bits: int | None = 8,
                minmax: bool = False, per_token: bool | None = None, clip: float | None = 2.5) -> nn.Module:
    """Ternarize the model and let it imitate its full-precision self, layer by layer.

    Args:
        logits: weight of the prediction loss.
        hidden: weight of the loss of the hidden states.
        scores: weight of the loss of the attention scores.
        class_mean: divide the prediction loss by the number of classes, as the authors' code does.
        teacher: a directory or Hub id of the full-precision model to learn from; None is the model itself as it comes in.
        adamw: AdamW in place of BERT's Adam without bias correction.
        lr: peak learning rate.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a line to zero follows.
        steps: optimizer steps.
        loss_aware: LAT in place of TWN.
        rows: one alpha for each output channel in place of one a matrix.
        embeddings: ternarize the word embedding; None does unless it is also the output head.
        input_bits: bits of the layers' inputs and of the signals inside attention; None leaves them in full precision.
        minmax: asymmetric inputs from minimum to maximum, unsigned probabilities (the paper's other choice), in place of symmetric ones.
        per_token: one scale a token in place of one a tensor; None does so in decoders.
        clip: cut weights and activations to plus and minus this; None cuts nothing (for models with larger activations than BERT's).

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        RunError: a teacher of another depth, width or vocabulary.
        RuleError: a model whose attention cannot be looked into.
    """
    taught = teacher_for(model, task, teacher)
    ternarize(model, task, loss_aware=loss_aware, rows=rows, embeddings=embeddings, input_bits=input_bits, minmax=minmax, per_token=per_token,
              clip=clip)
    loss = Imitation(task, taught, model, logits=logits, hidden=hidden, scores=scores, class_mean=class_mean)
    fit(model, task, optimizer=adam(adamw, lr, weight_decay), schedule=linear(warmup), steps=steps, loss=loss, clip=1.0 if adamw else None,
        tactics=[Curvature()] if loss_aware else [])
    return model


def adam(adamw: bool, lr: float, weight_decay: float) -> Optimizer:
    """BERT's Adam, or AdamW."""
    return AdamW(lr=lr, weight_decay=weight_decay) if adamw else BertAdam(lr=lr, weight_decay=weight_decay)


def ternarize(model: nn.Module, task: Task, *, loss_aware: bool, rows: bool, embeddings: bool | None, input_bits: int | None, minmax: bool,
              per_token: bool | None, clip: float | None) -> nn.Module:
    """Give the model TernaryBERT's numbers, untrained; arguments as in `ternarybert`."""
    def weight(grain: Grain) -> Quant:
        return Lat(grain=grain, clip=clip) if loss_aware else Quant(Ternary(0.7), grain, AbsMean(), refit=True, clip=clip)

    widen(model.parameters())                                     # all are trained; a quantized embedding answers in fp32, which bf16 could not read
    words = word_embedding(model) if embeddings is None or embeddings else None
    if embeddings and words is None:
        raise RuleError(f"{type(model).__name__} has no table of words as its input embeddings; write embeddings=False")
    table = [] if words is None or (embeddings is None and tied(model)) else [Rule(words, weight=weight(PerChannel()))]
    grain = PerToken() if per_token or (per_token is None and causal(model)) else PerTensor()
    inputs, inner = (None, []) if input_bits is None else activations(input_bits, grain, minmax, clip)
    quantize(model, [*table, *keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), *inner,
                     Rule("*", weight=weight(PerChannel() if rows else PerTensor()), input=inputs)], task)
    describe(model, task.probe()).check()
    return model


def activations(bits: int, grain: Grain, minmax: bool, clip: float | None) -> tuple[Quant, list[Rule]]:
    """The Quant of a layer's input, and the rules of the signals inside attention."""
    symmetric = Quant(Uniform(bits, narrow=True), grain, AbsMax(), clip=clip)
    positive = Quant(Uniform(bits, signed=False), grain, AbsMax(), clip=clip)
    signed = Quant(Uniform(bits, signed=False), grain, MinMax("offset"), clip=clip) if minmax else symmetric
    names: Sequence[str] = ("query", "key", "value")
    inner = [*(Rule(f"{Role.ATTENTION}:{name}", signal=signed) for name in names),
             Rule(f"{Role.ATTENTION}:probabilities", signal=positive if minmax else symmetric)]
    return signed, inner


def word_embedding(model: nn.Module) -> str | None:
    """The name of the input embeddings, where they are a table."""
    table = ask(model, "get_input_embeddings")
    return next((name for name, module in model.named_modules() if module is table and isinstance(module, nn.Embedding)), None)


def tied(model: nn.Module) -> bool:
    """Whether the output head is the input embedding."""
    head, table = ask(model, "get_output_embeddings"), ask(model, "get_input_embeddings")
    return head is not None and getattr(head, "weight", None) is getattr(table, "weight", None)


def causal(model: nn.Module) -> bool:
    """Whether an attention of the model hides later tokens."""
    return any(getattr(module, "is_causal", False) for module in model.modules())
