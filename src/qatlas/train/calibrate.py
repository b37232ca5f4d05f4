"""Calibration: the quantizers of activations see some batches, then decide their signedness and the start of their scales.

While they observe, they let everything pass; quantizers that need nothing (weights, dynamic scales) work as ever. Every rank sees the same batches
(a task is random access), so all ranks start alike without a word between them, also where an expert is met by few tokens; and the wrapping for
several processes copies the first rank's state before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    return settle(model, lambda: task.calibration(n), lambda batch: task.logits(model, batch))


def calibrate_on(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """The same where there is no task: on a few batches of the model's own arguments, as a Trainer's collator makes them.

    Raises:
        QuantError: quantizers that were never called, by name; no batch.
    """
    return settle(model, lambda: list(batches), lambda batch: model(**batch))


def settle(model: nn.Module, batches: Callable[[], Sequence[Mapping[str, Any]]], forward: Callable[[Any], Any]) -> int:
    """The same by any forward (a block's, on recorded inputs): batches() -> mappings; tensors among their values follow the model to its device.

    Raises:
        QuantError: as `calibrate`.
    """
    waiting = pending(model)
    if not waiting:
        return 0
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    for quantizer in waiting.values():
        quantizer.observe()
    try:
        seen = batches()
        with judged(model):
            for batch in seen:
                forward({name: value.to(where) if isinstance(value, Tensor) else value for name, value in batch.items()})
        unseen = [name for name, quantizer in waiting.items() if not quantizer.observed]
        if unseen:
            raise QuantError(f"{len(unseen)} of {len(waiting)} quantizers saw no input on {len(seen)} calibration batches: {', '.join(unseen[:8])}"
                             f"{' ...' if unseen[8:] else ''}. They were never called; keep them in full precision, or give batches that reach them")
        for quantizer in waiting.values():
            quantizer.settle()
            quantizer.to(where)
    finally:
        for quantizer in waiting.values():
            quantizer.observe(False)
    return len(waiting)
