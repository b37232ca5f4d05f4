"""How far two models are apart along their depth: the mean squared difference of the outputs of their blocks.

An error of a low-bit layer goes into all layers above it. The list of `depth_errors` shows whether it piles up: figure 2 of Teacher Intervention
(arXiv 2302.11812) is this list for a ternary BERT and its full-precision teacher. Hidden states at padding (where a batch has an `attention_mask` of
the same batch and length) do not count: nothing reads them.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from ..core.error import RunError
from ..model.blocks import blocks
from ..model.taps import read
from .evaluate import judged
from .task import Batch, Task, device, moved


def depth_errors(student: nn.Module, teacher: nn.Module, task: Task, n: int = 8) -> list[float]:
    """For each block, in depth order: the mean of (student's output - teacher's)^2 over the first n held-out batches, in eval mode.

    The quantizers of both models stay as they are. The first item is that of the first block; embeddings are before it.

    Raises:
        RunError: models with another number of blocks, or with outputs of another shape.
        QuantError: a model without repeated blocks; see `model.blocks`.
    """
    names = [[name for name, _ in blocks(model)] for model in (student, teacher)]
    if len(names[0]) != len(names[1]):
        raise RunError(f"the student has {len(names[0])} blocks ({names[0][0]}, ...) and the teacher {len(names[1])} ({names[1][0]}, ...): "
                       "errors by depth need two models of the same depth")
    total, count = [0.0] * len(names[0]), [0] * len(names[0])
    with judged(student), judged(teacher):
        for batch in islice(task.held_out(), n):
            ours, theirs = (_outputs(model, found, task, batch) for model, found in ((student, names[0]), (teacher, names[1])))
            for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
                if x.shape != y.shape:
                    raise RunError(f"block {names[0][i]} gives {tuple(x.shape)}, and the teacher's {tuple(y.shape)}: they cannot be compared")
                off = _counted(x.float() - y.float().to(x.device), batch).square()
                total[i], count[i] = total[i] + float(off.sum(dtype=torch.float64)), count[i] + off.numel()
    return [t / max(c, 1) for t, c in zip(total, count, strict=True)]


def _outputs(model: nn.Module, names: list[str], task: Task, batch: Batch) -> list[Tensor]:
    with read(model, [f"{name}:output" for name in names]) as signals:
        task.logits(model, moved(batch, device(model)))
        return [signals[f"{name}:output"] for name in names]


def _counted(x: Tensor, batch: Batch) -> Tensor:
    """(batch, tokens, width) -> (real tokens, width) where the batch says which are real."""
    mask = batch.get("attention_mask")
    return x[mask.bool().to(x.device)] if mask is not None and mask.shape == x.shape[:2] else x
