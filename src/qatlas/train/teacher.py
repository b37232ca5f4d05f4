"""Teachers: who says what the logits should be.

    Teacher(model)        another model, or a frozen copy of the student as it is now (Teacher.of)
    SelfTeacher(model)    the student's own weights with its quantizers off, at this very moment: no second copy in memory, and it moves along
    CachedTeacher         what a teacher said, read from disk (see cached)

The first two map a batch to logits, in eval mode and without a graph. All three say how far a student's logits are from theirs (`divergence`), of
which `Distil` makes a loss for `fit(loss=...)`. A teacher is not part of a resume point: it is made again from where the paper took it; what kind it
was is compared (`source`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.quantizer import Quantizer
from ..model.taps import read
from . import loss
from .evaluate import judged
from .task import Batch, Task, moved


class AnyTeacher(Protocol):
    """What `Distil` asks of a teacher. source: plain JSON that a resume point compares."""

    @property
    def source(self) -> Any: ...

    def divergence(self, task: Task, batch: Batch, logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor: ...


class Live:
    """Answers each batch anew: `__call__` gives the logits."""

    source: Any = "live"

    def __call__(self, task: Task, batch: Batch) -> Tensor:
        """The logits of a batch: as the task's `logits`."""
        raise NotImplementedError

    def divergence(self, task: Task, batch: Batch, logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
        """How far the student's logits are from the teacher's: as the task's `divergence`."""
        return task.divergence(logits, self(task, batch), temperature, mask)


class Teacher(Live):
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


class SelfTeacher(Live):
    """The student itself, quantizers off."""

    source = "self"

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
    """A loss for `fit`: (1 - share) * the task's loss + share * the teacher's divergence from the student, over the positions that the task counts.

    Raises:
        RunError: teacher and student with another number of classes.
    """

    def __init__(self, task: Task, teacher: AnyTeacher, *, temperature: float = 1.0, share: float = 1.0) -> None:
        self.source = teacher.source                              # first: the error of a resume point shows the beginning
        self.task, self.teacher, self.temperature, self.share = task, teacher, temperature, share

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        kept = Once(self.task.logits(model, batch))
        mask = loss.predicted(batch["labels"]) if kept.logits.dim() == 3 else None
        soft = self.teacher.divergence(self.task, batch, kept.logits, self.temperature, mask)
        return soft if self.share == 1 else (1 - self.share) * self.task.loss(kept, batch) + self.share * soft


class Once(nn.Module):
    """A model that has answered already: lets a task's loss read logits without a second forward."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.logits
