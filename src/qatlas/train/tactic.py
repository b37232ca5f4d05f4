"""Tactic: what a method does while training runs. And Loop, what it sees of the training.

    start    once, before the optimizer exists: add parameters, make a teacher
    before   at the beginning of a step
    passes   which forward and backward passes the step consists of; None is one plain pass
    loss     add to or replace the loss of a micro-batch (a mean over the micro-batch's items)
    grads    after each pass's backward, before clipping and stepping
    after    at the end of a step, when the weights have been written

Several tactics act in the order in which they were given. A tactic of strength zero leaves the run bit-identical (law 5). What it remembers across
steps goes through state_dict (tensors and plain values); `load_state_dict` is called after `start` and before the weights are loaded, so it may
restore a structure that has changed along the way.

SAM, for instance, is the two passes [Pass(steps=()), Pass(enter=climb)], with `grads` climbing down after the second; training several bit-widths in
turn is [Pass(enter=eight), Pass(enter=four), Pass(enter=two)], each stepping by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.error import RunError
from ..core.quantizer import Quantizer
from ..layers.quantized import Quantized
from .ranks import cut, opened

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .task import Batch, Task

Loss = Callable[[nn.Module, "Batch"], Tensor]


@dataclass
class History:
    """What a fit leaves behind, one entry a step: mean loss, learning rate of the first group, norm of the gradient before clipping, seconds,
    items."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, **entry: float) -> None:
        """One step more."""
        for name, value in entry.items():
            getattr(self, name).append(value)


@dataclass(frozen=True)
class Pass:
    """One forward and backward over the batch.

    enter: called before it (switch the bits, perturb the weights). loss: in place of the fit's. steps: roles of the groups that the optimizer steps
    afterwards (see optim); None is all, () is none. fresh: forget the gradients of the pass before.
    """

    enter: Callable[[Loop], None] | None = None
    loss: Loss | None = None
    steps: tuple[str, ...] | None = None
    fresh: bool = True


class Loop:
    """A training as a tactic sees it.

    model: unwrapped. names: trained parameter -> name; empty, and optimizer None, during `start`. step counts from 0. turn: number of the pass.
    batch: the global batch of the step.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, task: Task, steps: int, accelerator: Accelerator) -> None:
        self.model, self.task, self.steps, self.accelerator = model, task, steps, accelerator
        self.step, self.turn, self.history = 0, 0, History()
        self.names: dict[nn.Parameter, str] = {}
        self.batch: Batch = {}

    @property
    def progress(self) -> float:
        """The middle of this step as a part of the run, in (0, 1)."""
        return (self.step + 0.5) / self.steps

    def lr(self, parameter: nn.Parameter) -> float:
        """The learning rate of a parameter in this step; 0 where it is frozen."""
        return next((float(g["lr"]) for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])), 0.0)

    def layers(self) -> Iterator[tuple[str, Quantized]]:
        """Name and layer, of each layer with a weight quantizer."""
        for name, module in self.model.named_modules():
            if isinstance(module, Quantized) and module.weight_quantizer is not None:
                yield name, module

    def quantized(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """Weight, the values that its layer computes with (same shape), its learning rate; of each trained quantized weight, tied ones once.
        Under FSDP2 both are pieces, cut alike; the values are of the whole weight."""
        rates = {p: float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad}
        seen: set[int] = set()
        for _, layer in self.layers():
            if layer.weight in rates and id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                weight = layer.weight
                with opened(layer):
                    values = layer.hard()
                yield weight, cut(values, weight), rates[weight]

    def refresh(self) -> None:
        """Tell each layer that keeps its quantized weight that the weight was written: for writes through `.data`, which no version counter sees."""
        for module in self.model.modules():
            if isinstance(module, Quantized):
                module.refresh()


class Tactic:
    """Does nothing. Override what the method needs. Every argument of the constructor should be kept as an attribute: resume points compare them.

    pieces: whether it works where parameters, gradients and moments are in pieces (FSDP2; see ranks). One that has not said so is refused there.
    """

    pieces: ClassVar[bool] = False

    @classmethod
    def idle(cls) -> Tactic:
        """One of strength zero: it must leave a run bit-identical (law 5). Override it where the first argument is not the strength."""
        return cls(0.0)  # type: ignore[call-arg]

    def start(self, loop: Loop) -> None:
        """Once, before the optimizer is built."""

    def before(self, loop: Loop) -> None:
        """At the beginning of each step."""

    def passes(self, loop: Loop) -> Sequence[Pass] | None:
        """The passes of this step; at most one tactic of a run may have some."""
        return None

    def loss(self, loop: Loop, loss: Tensor, batch: Batch) -> Tensor:
        """The loss of a micro-batch -> the loss to minimise."""
        return loss

    def grads(self, loop: Loop) -> None:
        """After each pass's backward."""

    def after(self, loop: Loop) -> None:
        """At the end of each step."""

    def state_dict(self) -> dict[str, Any]:
        """What lasts across steps: tensors and plain JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class Freeze(Tactic):
    """Keep the quantizers' scales where they are for the first part `until` of the run (0: never), then let them learn.

    Without a gradient neither the scale nor its moments move, so the scale starts afresh when its rest ends.

    >>> Freeze(0.1).until
    0.1
    """

    pieces = True

    def __init__(self, until: float = 0.1) -> None:
        self.until = until

    def grads(self, loop: Loop) -> None:
        if loop.progress < self.until:
            for group in loop.optimizer.param_groups:
                if group["role"] == "scales":
                    for parameter in group["params"]:
                        parameter.grad = None                     # no gradient: neither the value nor its moments move


class Ramp(Tactic):
    """Let the quantizers in by and by: x + lambda (Q(x) - x), for weights and activations alike, lambda rising during the first part `over` of the
    run (0: whole from the first step).

    Lambda is a function of the step alone, so a resumed run goes on with it. It rises in equal amounts and is 1 in the last step whatever `over`
    says: what is stored has been trained with. Only training is mixed; a judgement along the way is of the whole quantizers.

    >>> [round(Ramp(0.5).blend(step, 6), 2) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    pieces = True

    def __init__(self, over: float = 0.1) -> None:
        if not 0 <= over <= 1:
            raise RunError(f"Ramp(over={over}): a part of the run, from 0 to 1")
        self.over = over

    def blend(self, step: int, steps: int) -> float:
        """Lambda of a step."""
        mixed = min(math.ceil(self.over * steps), steps - 1)
        return min(1.0, (step + 1) / (mixed + 1))

    def before(self, loop: Loop) -> None:
        for module in loop.model.modules():
            if isinstance(module, Quantizer):
                module.blend = self.blend(loop.step, loop.steps)


class NoDecay(Tactic):
    """Weight decay is 0 from the part `since` of the run on (1: never).

    >>> NoDecay(0.5).since
    0.5
    """

    pieces = True

    def __init__(self, since: float = 0.5) -> None:
        if not 0 <= since <= 1:
            raise RunError(f"NoDecay(since={since}): a part of the run, from 0 to 1")
        self.since = since

    @classmethod
    def idle(cls) -> NoDecay:
        """One that never acts."""
        return cls(1.0)

    def before(self, loop: Loop) -> None:
        if loop.progress >= self.since:
            for group in loop.optimizer.param_groups:
                group["weight_decay"] = 0.0
