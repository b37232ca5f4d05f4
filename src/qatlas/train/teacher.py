"""Teachers: who says what the logits should be.

    Teacher(model)        another model, or a frozen copy of the student as it is now (Teacher.of)
    SelfTeacher(model)    the student's own weights with its quantizers off, at this very moment: no second copy in memory, and it moves along

A teacher maps a batch to logits, in eval mode and without a graph. `Distil` makes a loss of it, for `fit(loss=...)`. A teacher is not part of a
resume point: it is made again from where the paper took it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.quantizer import Quantizer
from ..model.taps import read
from . import loss
from .evaluate import judged
from .task import Batch, Task, moved


class Teacher:
    """A frozen model. It is put into eval mode, its parameters lose their gradients, and it follows the batch to its device.

    >>> Teacher(nn.Linear(2, 2)).model.weight.requires_grad
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def of(cls, student: nn.Module) -> Teacher:
        """A copy of the student as it is now; the student is left alone."""
        return cls(copy.deepcopy(student))

    @torch.no_grad()
    def __call__(self, task: Task, batch: Batch) -> Tensor:
        """The logits of a batch: as the task's `logits`."""
        self.model.to(next(iter(batch.values())).device)
        return task.logits(self.model, batch)

    @torch.no_grad()
    def signals(self, task: Task, batch: Batch, addresses: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and the signals at these addresses (see model.signals), of one forward."""
        with read(self.model, addresses) as found:
            return self(task, batch), found


class SelfTeacher:
    """The student itself, quantizers off."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, task: Task, batch: Batch) -> Tensor:
        """The logits of a batch in full precision."""
        with full_precision(self.model), judged(self.model):
            return task.logits(self.model, moved(batch, next(iter(batch.values())).device))

    def signals(self, task: Task, batch: Batch, addresses: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """As Teacher.signals."""
        with full_precision(self.model), judged(self.model), read(self.model, addresses) as found:
            return task.logits(self.model, batch), dict(found)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """All quantizers of the model off inside; afterwards each is as it was."""
    found = [(q, q.on) for q in model.modules() if isinstance(q, Quantizer)]
    try:
        for quantizer, _ in found:
            quantizer.on = False
        yield
    finally:
        for quantizer, on in found:
            quantizer.on = on


class Distil:
    """A loss for `fit`: (1 - share) * the task's loss + share * kl(student, teacher, temperature), over the positions that the task counts.

    Raises:
        RunError: teacher and student with another number of classes.
    """

    def __init__(self, task: Task, teacher: Callable[[Task, Batch], Tensor], *, temperature: float = 1.0, share: float = 1.0) -> None:
        self.task, self.teacher, self.temperature, self.share = task, teacher, temperature, share

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        target = self.teacher(self.task, batch)
        kept = Once(self.task.logits(model, batch))
        mask = loss.predicted(batch["labels"]) if kept.logits.dim() == 3 else None
        soft = loss.kl(kept.logits, target, self.temperature, mask)
        return soft if self.share == 1 else (1 - self.share) * self.task.loss(kept, batch) + self.share * soft


class Once(nn.Module):
    """A model that has answered already: lets a task's loss read logits without a second forward."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.logits
