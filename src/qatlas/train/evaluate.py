"""Judging a model on the held-out part of its task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .task import Task


def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """The task's score of the model (see the task's `score`), in eval mode and without a graph; each module's mode is restored."""
    with judged(model):
        return task.score(model)


@contextmanager
def judged(model: nn.Module) -> Iterator[None]:
    """Eval mode and no graph inside; afterwards each module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
