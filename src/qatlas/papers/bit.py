"""BiT: transformers whose weights and activations are one bit each, taught step by step.

Zechun Liu, Barlas Oguz, Aasish Pappu, Lin Xiao, Scott Yih, Meng Li, Raghuraman Krishnamoorthi, Yashar Mehdad, NeurIPS 2022, arXiv 2205.13016.
Official code: facebookresearch/bit (CC-BY-NC: studied, nothing copied). Numbers, gradients, losses and learning rates were held against it
(tests/test_golden.py); that alphas start anew in each stage, and which chains were tried, is from memory of the paper.

A transformer of one bit everywhere collapses when it is binarized at a blow. Three remedies:

    two sets     what is never negative (attention probabilities, the feed-forward part after a ReLU) takes {0, alpha}, all else {-alpha, alpha}:
                 the sign of a softmax is all ones and says nothing
    elastic      alpha and a threshold beta are learned for each activation:
                     {-1, 1}   x_b = alpha sign(x - beta)                        dx = g where |x - beta| <= alpha
                     {0, 1}    x_b = alpha clip(round((x - beta) / alpha), 0, 1)   dx = g where beta <= x <= alpha + beta
                 dbeta = -dx;  dalpha = gamma sum g sign, or LSQ's round(u) - u inside and 1 above;  gamma = 1 / sqrt(elements)
    multi-       the full-precision model teaches one with activations of 2 bits, that one teaches one of 1 bit (`chain`): a student is nearer to
    distillation a teacher that is nearly as coarse. The student begins with its teacher's weights and thresholds

Weights: mean|w| sign(w - mean w), one scale a matrix; one a row of the word embedding, with the mean of the whole matrix. Their gradient has no mask.
Activations of more bits (the stages between) are LSQ's integers, their step learned. alpha starts at 2 mean|x| / sqrt(Qp), in {0, 1} at 4 mean|x|,
measured by calibration. The loss of each stage, without labels:

    L = CE(z^S, softmax z^T) + sum over hidden states MSE(H^S, H^T)

Quantized: word embedding, all linear layers of the blocks and the pooler, their inputs, and query, key, value, probabilities inside attention. Full:
positions, norms, residual sums, biases, classifier. GELU becomes ReLU, so that what follows it is never negative; a gated feed-forward part (Llama)
keeps its own, and which set a signal takes is seen in calibration.

Otherwise than the authors:
- `moves`: their thresholds work at the inputs of layers; those of Q, K, V are computed and then not used, and the probabilities have none. The
  formula of the paper knows no exception, and so they are everywhere here ("all"); "inputs" is what the code does. At layers one threshold a feature,
  in Q, K, V one a feature and head, one alone for the probabilities, whose features are positions.
- `minimum`: at more than one bit their code takes the tensor's own minimum off the unsigned ones before rounding, without a gradient, and adds it
  afterwards. In what is never negative it is 0, or next to it; and in a decoder it would let later tokens move earlier ones. Off, refused there.
- Their prediction loss is divided by the number of classes (`class_mean`), their teacher has dropout on (`teacher_dropout`). For regression their
  loss is 0 by construction; ours is the squared difference.
- sign(0) is +1. The learning rate of a step is that of its middle; the last state is kept, not the best on the development set.
- The stages share `steps` equally and go on in the data, so that a chain and a direct run cost the same. Theirs trains each in full length.

Learning rates: 1e-4 to 5e-4 for weights (ten times TernaryBERT's), 1e-4 for alphas in units of one; in short runs alphas want `relative`.
Numbers of ours: docs/results.md#bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.centred import Centred
from ..core.error import QuantError, RuleError, RunError
from ..core.estimator import Clip, Estimator, Ste
from ..core.grain import Grain, PerChannel, PerTensor
from ..core.grid import Grid, Sign, Uniform
from ..core.place import Place
from ..core.qtensor import QTensor
from ..core.quantizer import Known, Quant, Quantizer, working
from ..core.scale import AbsMean, Learned, Scale
from ..model.blocks import blocks
from ..model.coverage import describe
from ..model.quantized import quantized, quantizers
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit, widen
from ..train.imitate import Imitation, teacher_for
from ..train.optim import AdamW, BertAdam
from ..train.schedule import linear
from ..train.task import Task
from ..train.teacher import Teacher
from .ternarybert import causal, tied, word_embedding

CLAIM = "One bit for weights and for activations, taught in a chain, comes within 5.9 points of BERT on GLUE."
Moves = Literal["all", "inputs", "none"]
FLOOR = 1e-5                                                      # of alpha
FIELDS = ("hidden_act", "activation_function", "hidden_activation", "activation")       # where a configuration names its GELU


@dataclass(frozen=True)
class Elastic(Quant):
    """A binary (or k-bit) activation with a learned scale, and a move = -beta that is learned, too.

    move: "feature" has one for each index of the last axis, "head" one for each of (batch, head, tokens, here), "tensor" one, "none" none.
    learn: False leaves alpha where it starts, at mean|x| for {-1, 1}. minimum: see the head of the file.
    """

    grid: Grid = Uniform(1, None)
    grain: Grain = field(default=PerTensor())
    scale: Scale = field(default=Learned(AbsMean(2.0, per_root=True), over="tensor", floor=FLOOR))
    estimator: Estimator = field(default=Clip())
    move: str = "feature"
    learn: bool = True
    minimum: bool = False
    plain: ClassVar[bool] = False

    def build(self) -> Elasticity:
        return Elasticity(self)

    def closed(self, signed: bool, bits: int | None = None) -> Elastic:
        """With the set chosen: {-1, 1} or {0, 1}; of so many bits, or as many as before.

        >>> Elastic().closed(True).grid, Elastic().closed(False).grid, Elastic().closed(True, 2).grid.values()
        (Sign(), Uniform(bits=1, signed=False, narrow=False), tensor([-2., -1.,  0.,  1.]))
        """
        bits = bits or self.bits
        sign = signed and bits == 1
        times = 4.0 if not signed else 1.0 if sign and not self.learn else 2.0
        scale = Learned(AbsMean(times, per_root=True), over="tensor", floor=FLOOR, gradient="value" if sign else "clipped",
                        factor="lsq" if self.learn else 0.0)
        return self.but(grid=Sign() if sign else Uniform(bits, signed), scale=scale)


class Elasticity(Quantizer):
    """The module of `Elastic`: x is moved, then quantized. The move is made by calibration, as zeros."""

    quant: Elastic
    move: nn.Parameter | None

    def __init__(self, quant: Elastic) -> None:
        super().__init__(quant)
        self._like: torch.Size = torch.Size()
        self.register_parameter("move", None)

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        y = super().forward(self.moved(x), shift, known) if self.on else x
        return x if self._seen is not None else y.to(x.dtype)

    def moved(self, x: Tensor) -> Tensor:
        """x - beta, in fp32 at least. With one move for all, zeros stay: a probability of 0 is what the mask hides, and must not come back."""
        if self.move is None:
            return x
        y = working(x) + (self.move.view(x.shape[1], 1, x.shape[3]) if self.quant.move == "head" else self.move)
        return torch.where(x == 0, 0.0, y) if self.quant.move == "tensor" else y

    def quantize(self, x: Tensor, shift: Tensor | None = None) -> QTensor:
        return super().quantize(self.moved(x), shift)

    def place(self, view: Tensor) -> Place:
        found = super().place(view)
        if self.quant.minimum and self.quant.bits > 1 and self.quant.grid.low == 0:
            found = found._replace(offset=view.detach().amin(-1, keepdim=True))
        return found

    def initialise(self, x: Tensor) -> Quantizer:
        self._like = x.shape
        return super().initialise(x)

    def settle(self, gather: Any = None) -> None:
        if self._seen and getattr(self.quant.grid, "signed", True) is None:
            self.quant = self.quant.closed(any(bool(x.min() < 0) for x in self._seen))
        super().settle(gather)

    def bits(self, bits: int) -> None:
        """Take other bits: the set and the move stay, alpha waits for calibration."""
        if bits != self.quant.bits:
            self.quant, self.scale = self.quant.closed(self.quant.grid.low < 0, bits), None

    def _remember(self, x: Tensor) -> None:
        self._like = x.shape
        super()._remember(x)

    def _hold(self, place: Place) -> Quantizer:
        n = {"feature": self._like[-1:], "head": (self._like[1], self._like[-1]) if len(self._like) == 4 else (), "tensor": (1,), "none": ()}
        if self.move is None and (shape := n[self.quant.move]):
            self.move = nn.Parameter(torch.zeros(shape).flatten())
        return super()._hold(place)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.move is None and f"{prefix}move" in state:
            self.move = nn.Parameter(torch.zeros_like(state[f"{prefix}move"]))
        super()._load_from_state_dict(state, prefix, *rest)


def bit(model: nn.Module, task: Task, *, chain: tuple[int, ...] = (2, 1), two_sets: bool = True, elastic: bool = True, moves: Moves = "all",
        relu: bool = True, minimum: bool = False, embeddings: bool | None = None, logits: float = 1.0, hidden: float = 1.0, scores: float = 0.0,
        class_mean: bool = False, teacher: str | None = None, teacher_dropout: bool = False, adamw: bool = False, lr: float = 2e-4,
        scale_lr: float = 1e-4, relative: bool = False, weight_decay: float = 0.01, warmup: float = 0.1, steps: int = 600) -> nn.Module:
    """Binarize weights and activations, each stage taught by the one before.

    Args:
        chain: bits of the activations in each stage, 1 to 8; (2, 1) is the paper's, (1,) learns from full precision alone. Weights have 1 throughout.
        two_sets: {0, 1} for signals that are never negative; else {-1, 1} everywhere, which shows what is masked too: not in decoders.
        elastic: learn alpha and the thresholds; else they stay where they start, alpha of {-1, 1} at mean|x|.
        moves: where thresholds are learned: all, inputs (of layers: the authors' code) or none.
        relu: put ReLU in the place of GELU.
        minimum: take the minimum of unsigned tensors of more than one bit off before rounding, as the authors' code does; not in decoders.
        embeddings: binarize the word embedding; None does unless it is also the output head.
        logits: weight of the prediction loss.
        hidden: weight of the loss of the hidden states.
        scores: weight of the loss of the attention scores; the paper's runs leave it out.
        class_mean: divide the prediction loss by the number of classes, as the authors' code does.
        teacher: a directory or Hub id of the first stage's teacher; None is the model itself as it comes in.
        teacher_dropout: leave dropout on in the teachers, as the authors' code does.
        adamw: AdamW in place of BERT's Adam without bias correction.
        lr: peak learning rate of weights, norms and thresholds.
        scale_lr: peak learning rate of alphas, in units of one; with relative a share of each alpha's own size.
        relative: read scale_lr as that share.
        weight_decay: of matrices only.
        warmup: share of each stage's steps that warm up; a line to zero follows.
        steps: optimizer steps of all stages together, shared equally.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        RunError: a chain of no stages or more than steps; a teacher of another depth, width or vocabulary.
        QuantError: bits beyond 1 to 8; minimum, or one set, in a decoder.
        RuleError: a model whose attention cannot be looked into.
    """
    if not chain or steps < len(chain):
        raise RunError(f"chain={tuple(chain)} and steps={steps}: a chain has one stage or more, and each needs a step")
    if wrong := [bits for bits in chain if bits not in range(1, 9)]:
        raise QuantError(f"chain={tuple(chain)}: activations have 1 to 8 bits, not {wrong[0]}")
    taught, done = teacher_for(model, task, teacher), 0
    binarize(model, task, bits=chain[-1], two_sets=two_sets, elastic=elastic, moves=moves, relu=relu, minimum=minimum, embeddings=embeddings)
    rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "scale_share" if relative else "scale_lr": scale_lr}
    for stage, bits in enumerate(chain):
        taught = Teacher.of(model) if stage else taught            # the student that was trained last, as it answers
        at(model, task, bits)
        loss = Imitation(task, taught, model, logits=logits, hidden=hidden, scores=scores, class_mean=class_mean)
        taught.model.train(teacher_dropout)
        last = steps * (stage + 1) // len(chain)
        fit(model, task.later(done), optimizer=AdamW(**rates) if adamw else BertAdam(**rates), schedule=linear(warmup), steps=last - done, loss=loss,
            clip=1.0 if adamw else None)
        done = last
    return model


def binarize(model: nn.Module, task: Task, *, bits: int = 1, two_sets: bool = True, elastic: bool = True, moves: Moves = "all", relu: bool = True,
             minimum: bool = False, embeddings: bool | None = None) -> nn.Module:
    """Give the model BiT's numbers, untrained, activations of so many bits; arguments as in `bit`."""
    if causal(model) and (minimum or not two_sets):
        why = "the minimum of a whole tensor lets later tokens move earlier ones" if minimum else "{-1, 1} has no zero for what the mask hides"
        raise QuantError(f"{type(model).__name__} is a decoder: {why}; leave {'minimum' if minimum else 'two_sets=False'} out")
    widen(model.parameters())
    words = word_embedding(model) if embeddings is None or embeddings else None
    if embeddings and words is None:
        raise RuleError(f"{type(model).__name__} has no table of words as its input embeddings; write embeddings=False")
    if relu:
        rectify(model)

    def signal(move: str, inside: bool = True) -> Elastic:
        said = Elastic(Uniform(bits, None), move=move if elastic and (moves == "all" or (moves == "inputs" and not inside)) else "none",
                       learn=elastic, minimum=minimum)
        return said if two_sets else said.closed(True)

    table = [] if words is None or (embeddings is None and tied(model)) else [Rule(words, weight=of_weight(rows=True))]
    positive = signal("tensor").closed(not two_sets)
    inner = [*(Rule(f"{Role.ATTENTION}:{name}", signal=signal("head")) for name in ("query", "key", "value")),
             Rule(f"{Role.ATTENTION}:probabilities", signal=positive)]
    quantize(model, [*table, *keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER, Role.CONV), *inner,
                     Rule(Role.LINEAR, weight=of_weight(), input=signal("feature", inside=False))], task)
    describe(model, task.probe()).check()
    return model


def of_weight(rows: bool = False) -> Centred:
    """Of a weight: mean|w| sign(w - mean w), one scale for the matrix, or one a row and the mean of the whole."""
    return Centred(Sign(), PerChannel() if rows else PerTensor(), AbsMean(), Ste(), whole=rows)


def at(model: nn.Module, task: Task, bits: int) -> None:
    """Give every elastic quantizer so many bits; their alphas are measured anew, sets and thresholds stay."""
    for quantizer in quantizers(model).values():
        if isinstance(quantizer, Elasticity):
            quantizer.bits(bits)
    task.calibrate(model)
    for layer in quantized(model).values():
        if isinstance(layer.input_quantizer, Elasticity):
            layer.slots = layer.slots.but(input=layer.input_quantizer.quant)


def rectify(model: nn.Module) -> list[str]:
    """Put ReLU in the place of every GELU in a block that does not multiply it with a gate; the configuration says so, too. Their names."""
    found = []
    for at, block in blocks(model):
        for name, module in list(block.named_modules()):
            owner, _, leaf = name.rpartition(".")
            parent = block.get_submodule(owner)
            if "gelu" in type(module).__name__.lower() and not any("gate" in child for child in parent._modules):
                setattr(parent, leaf, nn.ReLU())
                found.append(f"{at}.{name}")
    copies: dict[int, Any] = {}                                   # another model made from the same configuration stays as it is
    for part in model.modules() if found else ():
        if hasattr(getattr(part, "config", None), "to_dict"):
            config: Any = copy.deepcopy(part.config, copies)
            for name in FIELDS:
                if "gelu" in str(getattr(config, name, "")):
                    setattr(config, name, "relu")
            part.config = config
    return found
