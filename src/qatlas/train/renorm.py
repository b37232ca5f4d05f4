"""Batch norms measured anew: their statistics as plain means over training batches, of the weights as they now are.

A running mean is that of weights which the training has left since; where they jump from level to level (low bits), it is of no model at all.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .evaluate import judged
from .task import Task, device, moved


@torch.no_grad()
def reestimate(model: nn.Module, task: Task, batches: int = 50) -> int:
    """Measure the batch norms' statistics anew: plain means over training batches, all else in eval mode. 0 batches leave them. -> how many norms"""
    norms = [m for m in model.modules() if batches and isinstance(m, _BatchNorm) and m.track_running_stats]
    with judged(model):
        rates = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True             # None: a plain mean
        for step in range(batches if norms else 0):
            task.logits(model, moved(task.batch(step), device(model)))
        for norm, rate in zip(norms, rates, strict=True):
            norm.momentum = rate
    return len(norms)
