"""Calibration: the quantizers of activations see some batches, then decide their signedness and the start of their scales.

While they observe, they let everything pass; quantizers that need nothing (weights, dynamic scales) work as ever. Every rank sees the same batches
(a task is random access), so all ranks start alike without a word between them, also where an expert is met by few tokens; and the wrapping for
several processes copies the first rank's state before the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..core.error import QuantError
from ..core.grid import Uniform
from ..core.quantizer import Quantizer
from .evaluate import judged

if TYPE_CHECKING:
    from .task import Task


def pending(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers that cannot work yet: no scale, or a signedness that is still open."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    return {name: q for name, q in found.items() if not q.ready or (isinstance(q.quant.grid, Uniform) and q.quant.grid.signed is None)}


def calibrate(model: nn.Module, task: Task, n: int = 8) -> int:
    """Initialise every pending quantizer on the task's first n batches; their number.

    Raises:
        QuantError: quantizers that were never called, by name.
    """
    waiting = pending(model)
    if not waiting:
        return 0
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    for quantizer in waiting.values():
        quantizer.observe()
    try:
        with judged(model):
            for batch in task.calibration(n):
                task.logits(model, {name: value.to(where) for name, value in batch.items()})
        unseen = [name for name, quantizer in waiting.items() if not quantizer.observed]
        if unseen:
            raise QuantError(f"{len(unseen)} of {len(waiting)} quantizers saw no input on {n} calibration batches: {', '.join(unseen[:8])}"
                             f"{' ...' if unseen[8:] else ''}. They were never called; keep them in full precision, or give batches that reach them")
        for quantizer in waiting.values():
            quantizer.settle()
            quantizer.to(where)
    finally:
        for quantizer in waiting.values():
            quantizer.observe(False)
    return len(waiting)
