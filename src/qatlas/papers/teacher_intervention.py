"""Teacher Intervention: train the parts of a quantized transformer on clean inputs first.

Minsoo Kim, Kyuhong Shim, Seongmin Park, Wonyong Sung, Jungwook Choi, EACL 2023, arXiv 2302.11812. Official code: MarsJacobs/ti-kd-qat (BERT and GLUE
only; the image models of the paper are not in it). Every signal, loss and gradient of that code on a small BERT, in all four modes, is a test
(tests/test_golden.py). The paper's full text was not at hand: what is said of it beyond the code is second hand.

Below two bits the error of each layer grows on its way through the depth, and the layers above learn from noise. So for a short while the teacher
takes over inside the student: in every layer at once, one signal of the student's is replaced by the teacher's own, of the same batch.

    X -> Q, K, V -> scores -> map = softmax -> context = map V -> output = context W_O -> residual, norm -> feed-forward -> next X

    "map"       the attention map      what runs on the student's error: V, W_O, feed-forward      Q, K hear no gradient through X
    "context"   map times V                                              W_O, feed-forward         Q, K, V hear none
    "output"    after W_O, before dropout, residual and norm             feed-forward              Q, K, V hear none
    "gradual"   output for the first sixth of the time, context for the second, then map (TI-G)

The student still computes what is replaced, since its losses read it. So a layer's score loss trains W_Q and W_K of that layer and nothing below.
Then the teacher steps aside, and plain distillation with a fresh optimizer and schedule goes on for the rest of the same budget. The losses are
those of TernaryBERT, whose numbers these are, and one more in both parts:

    L = CE(z^S, softmax z^T) + sum MSE(hidden) + sum MSE(scores) + sum MSE(Y),        Y the attention block's output after residual and norm

The figure of the paper draws the last one before the norm; then W_V and W_O learn from it also under "output" (`before_norm`).

Otherwise than the authors:
- In a pre-norm model (decoders, ViT) Y is what the feed-forward part reads, and the attention output is what leaves W_O: the same two points.
- The second part goes on in the data where the first ended, so that a run of equal length without intervention sees the same batches in one order.
- The first part takes a tenth of the steps where `first` is not given; theirs is 60 steps (120 for CoLA) of 230 to 37,000.
- The last state is kept, theirs is the best on the development set.

Numbers of ours: docs/results.md#teacher-intervention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from ..core.error import RuleError, RunError, unknown
from ..model import signals
from ..model.taps import override, read, stop_gradient
from ..train.fit import fit
from ..train.imitate import Imitation, bare, teacher_for
from ..train.schedule import linear
from ..train.tactic import Loop, Pass, Tactic
from ..train.task import Batch, Task
from ..train.teacher import SelfTeacher, Teacher
from .ternarybert import Curvature, adam, ternarize

CLAIM = "Training parts on the teacher's signals first converges faster and ends better than distillation alone below 2 bits."
POINTS = {"output": "projected", "context": "context", "map": "probabilities"}        # where the teacher comes in -> the signal's name
PLANS: dict[str, tuple[tuple[float, str], ...]] = {                                    # (until which part of the time, where)
    "output": ((1.0, "output"),), "context": ((1.0, "context"),), "map": ((1.0, "map"),),
    "gradual": ((1 / 6, "output"), (1 / 3, "context"), (1.0, "map")),
    "inverted": ((1 / 3, "map"), (2 / 3, "context"), (1.0, "output")),
    "none": ((1.0, "none"),),
}
Mode = Literal["gradual", "output", "context", "map", "inverted", "stochastic", "none"]


class Intervened(Imitation):
    """Imitation while the teacher is at work inside the student; `at` one of output, context, map."""

    def __init__(self, task: Task, teacher: Teacher | SelfTeacher, student: nn.Module, at: str, **terms: Any) -> None:
        if at not in POINTS:
            raise RunError(unknown("point of intervention", at, POINTS))
        self.at = at
        self.injected = [spot.address for spot in signals.find(student, f"@attention:{POINTS[at]}")]
        self.stopped = stops(student, at)
        if len(self.injected) < len(signals.attentions(student)):
            raise RunError(f"{len(self.injected)} of {len(signals.attentions(student))} attentions of {type(student).__name__} have the signal "
                           f"{POINTS[at]}: the teacher comes in at all of them or not at all. Take another mode")
        super().__init__(task, teacher, student, **terms)

    def read(self) -> list[str]:
        return list(dict.fromkeys([*super().read(), *self.injected]))

    def forward(self, model: nn.Module, batch: Batch, theirs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inner = bare(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(override(inner, {address: theirs[address] for address in self.injected}))
            stack.enter_context(stop_gradient(inner, self.stopped))
            own = stack.enter_context(read(inner, super().read()))
            return self.task.logits(model, batch), dict(own)


def stops(model: nn.Module, at: str) -> list[str]:
    """Where no gradient passes down: the inputs of Q and K, and of V unless the map is replaced.

    Raises:
        RuleError: the map in a model that makes Q, K and V by one matrix: V's input cannot be told from theirs; projections of unknown names.
    """
    if at == "map":
        signals.find(model, "@attention:query_input")             # where no attention has it, this says why
    found = signals.attentions(model).values()
    lost = next((near.name for near in found if not near.parts and (at == "map" or not near.fused)), None)
    if lost is not None:
        raise RuleError(f"{lost} has no projections of query, key and value under names that are known: no gradient may pass down through them where "
                        "the teacher comes in. Take mode='none', or the paper ternarybert")
    if at == "map":
        return ["@attention:query_input", "@attention:key_input"]
    return [address for near in found for address in ([f"{near.fused}:input"] if near.fused else [f"{part}:input" for part in near.parts or ()])]


class Intervention(Tactic):
    """In each step of a fit, the loss of the point whose turn it is. losses: point -> Intervened; none leaves the run alone."""

    pieces = True

    def __init__(self, mode: str, losses: dict[str, Intervened] | None = None) -> None:
        self.mode, self.losses = mode, losses or {}

    @classmethod
    def idle(cls) -> Intervention:
        return cls("gradual")

    def start(self, loop: Loop) -> None:
        """Refuse several processes, where parameters without a gradient would hang or stop DDP."""
        silent = sorted({"output", "context"} & set(self.losses))
        if loop.accelerator.num_processes > 1 and silent:
            raise RunError(f"the teacher comes in at {' and '.join(silent)}, where projections get no gradient, and {loop.accelerator.num_processes} "
                           "processes wait for one of every parameter: run in one process, or take mode='map'")

    def passes(self, loop: Loop) -> Sequence[Pass] | None:
        loss = self.losses.get(turn(self.mode, loop.step, loop.steps, loop.task.run.seed))
        return None if loss is None else [Pass(loss=loss)]


def turn(mode: str, step: int, steps: int, seed: int = 0) -> str:
    """Whose turn it is in a step.

    Raises:
        RunError: a mode that does not exist.

    >>> [[turn("gradual", step, 60) for step in range(60)].count(point) for point in POINTS]
    [10, 10, 40]
    """
    if mode == "stochastic":
        return list(POINTS)[int(np.random.default_rng([seed, step, 2]).integers(len(POINTS)))]
    if mode not in PLANS:
        raise RunError(unknown("mode", mode, [*PLANS, "stochastic"]))
    return next(point for until, point in PLANS[mode] if step < until * steps)


def teacher_intervention(model: nn.Module, task: Task, *, mode: Mode = "gradual", first: int | None = None, first_lr: float | None = None,
                         before_norm: bool = False, logits: float = 1.0, hidden: float = 1.0, scores: float = 1.0, output: float = 1.0,
                         teacher: str | None = None, adamw: bool = False, lr: float = 2e-5, weight_decay: float = 0.01, warmup: float = 0.1,
                         steps: int = 600, loss_aware: bool = False, rows: bool = False, embeddings: bool | None = None,
                         input_bits: int | None = 8, minmax: bool = False, per_token: bool | None = None, clip: float | None = 2.5) -> nn.Module:
    """Ternarize the model, let its teacher intervene for a while, then train it by plain distillation.

    Args:
        mode: where the teacher comes in: output, context or map all the time; gradual from output to map; inverted; stochastic draws anew each step;
            none nowhere, so that only the learning rate starts anew: the control that any gain should be held against.
        first: steps with intervention; None is a tenth of all, 0 has none (TernaryBERT with one loss more).
        first_lr: peak learning rate of the first part; None is `lr`.
        before_norm: take the output loss before residual and norm, as the paper's figure draws it, in place of after them.
        logits: weight of the prediction loss.
        hidden: weight of the loss of the hidden states.
        scores: weight of the loss of the attention scores.
        output: weight of the loss of the attention block's output.
        teacher: a directory or Hub id of the full-precision model to learn from; None is the model itself as it comes in.
        adamw: AdamW in place of BERT's Adam without bias correction.
        lr: peak learning rate.
        weight_decay: of matrices only.
        warmup: share of each part's steps that warm up; a line to zero follows.
        steps: optimizer steps of both parts together.
        loss_aware: TernaryBERT's LAT in place of TWN.
        rows: one alpha for each output channel in place of one a matrix.
        embeddings: ternarize the word embedding; None does unless it is also the output head.
        input_bits: bits of the layers' inputs and of the signals inside attention; None leaves them in full precision.
        minmax: asymmetric inputs and unsigned probabilities in place of symmetric ones.
        per_token: one scale a token in place of one a tensor; None does so in decoders.
        clip: cut weights and activations to plus and minus this; None cuts nothing (for models with larger activations than BERT's).

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        RunError: a teacher of another depth, width or vocabulary; more first steps than steps.
        RuleError: attention that cannot be looked into; a map to replace in a model that makes Q, K and V by one matrix.
    """
    first = min(max(1, steps // 10), steps - 1) if first is None else first
    if not 0 <= first < steps:
        raise RunError(f"first={first} steps with intervention of {steps} in all: the second part needs at least one")
    turn(mode, 0, 1)                                               # a wrong mode fails before anything moves
    points = {turn(mode, step, first, task.run.seed) for step in range(first)} - {"none"}
    taught = teacher_for(model, task, teacher)
    ternarize(model, task, loss_aware=loss_aware, rows=rows, embeddings=embeddings, input_bits=input_bits, minmax=minmax, per_token=per_token,
              clip=clip)
    terms: dict[str, Any] = {"logits": logits, "hidden": hidden, "scores": scores, "projected" if before_norm else "attended": output}
    plain = Imitation(task, taught, model, **terms)
    train = partial(fit, model, schedule=linear(warmup), loss=plain, clip=1.0 if adamw else None)
    aware = [Curvature()] if loss_aware else []
    if first:
        at = Intervention(mode, {point: Intervened(task, taught, model, point, **terms) for point in sorted(points)})
        train(task, optimizer=adam(adamw, lr if first_lr is None else first_lr, weight_decay), steps=first, tactics=[at, *aware])
    train(task.later(first), optimizer=adam(adamw, lr, weight_decay), steps=steps - first, tactics=aware)
    return model
