"""reconstruct: fit, one block at a time. Each block learns to give what it gave in full precision, from what the quantized blocks before it give.

    X_f, X_q                 what enters the block in the full-precision model, and behind the quantized blocks
    Y = block(X_f)           in full precision: the target, and the next X_f
    min  loss(block_q(X_q), Y)                                     over what `train` names of the block
    X_q = block_q(X_q)       with what it has become: the next X_q

So later blocks hear, and mend, the errors of earlier ones. In memory are one block with its masters, gradients and moments, and the two streams (on
disk where asked); where the rules are given here, a block is quantized when its turn comes and packed when it is over, so that the others stay as
they were loaded, or are codes. benchmarks/block_ap.py measures that this does not grow with the number of blocks.

Each block is a fit of its own, with a phase of its own in the run: a finished one is replayed from its saved state, the one in progress goes on from
its point, at a step; streams are computed again on the way, from the same weights, to the same bits. Blocks run as in training but for dropout, which
would be noise on the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.error import RuleError
from ..core.quantizer import Quantizer
from ..layers.quantized import Layer
from ..model import artefact
from ..model.blocks import blocks, run_block
from ..model.coverage import Coverage, describe
from ..model.rules import Decision, Rule, decided
from . import data
from .calibrate import pending, settle
from .fit import fit
from .loss import mse
from .optim import Optimizer
from .resume import described
from .streams import Stream, Walk, part
from .tactic import History, Tactic
from .task import Batch, Task, shuffled
from .teacher import full_precision

CALIBRATION = 8                                                   # batches on which static activations are settled


class BlockTask(Task):
    """A batch of block i: `hidden` (rows, ...) from X_q, `target` (rows, ...), `chunk` (rows,) its number, and `mask` (rows, tokens) where the task's
    batches have padding. The recorded batches stay together; each epoch visits all, in an order of its own."""

    held_rows = 0
    whole = False

    def __init__(self, task: Task, walk: Walk, i: int, target: Stream, criterion: Callable[..., Tensor]) -> None:
        super().__init__(task.batch_size, task.target, (), task.run)
        self._walk, self._i, self._target, self._criterion = walk, i, target, criterion
        self.rows, self.title = walk.count, f"block {i + 1} of {len(walk.names)}"
        self.fingerprint = data.digest([f"{task.fingerprint} {walk.names[i]} {walk.count} {described(criterion)}".encode()])

    def batch(self, step: int) -> Batch:
        epoch, at = divmod(step, self.rows)
        k = int(shuffled(self.run.seed, epoch, self.rows)[at])
        hidden, mask = self._walk.quantized[k], self._walk.masks[k]
        out = {"hidden": hidden, "target": self._target[k], "chunk": torch.full((len(hidden),), k), "row": torch.arange(len(hidden))}
        return out if mask is None or mask.shape != hidden.shape[:2] else out | {"mask": mask}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        for module in model.modules():
            module.training = isinstance(module, Quantizer | Layer)
        k, first = int(batch["chunk"][0]), int(batch["row"][0])
        rows, of = slice(first, first + len(batch["row"])), self._walk.rows[k]
        call = self._walk.call(self._i, k, batch["hidden"])
        answer = run_block(model, call if len(batch["row"]) == of else part(call, rows, of).on(batch["hidden"]))
        masked = (batch["mask"],) if "mask" in batch else ()
        return self._criterion(answer if isinstance(answer, Tensor) else answer[0], batch["target"], *masked)

    def weight(self, batch: Batch) -> int:
        return int(batch["mask"].sum()) if "mask" in batch else len(batch["row"])


def reconstruct(model: nn.Module, task: Task, *, rules: str | Sequence[Rule] | None = None, loss: Callable[..., Tensor] = mse,
                train: str | Sequence[str] = "*", optimizer: Optimizer | None = None, schedule: Callable[[float], float] | None = None, steps: int,
                batches: int = 32, packed: bool = False, within: str = "", streams: Path | str | None = None, tactics: Sequence[Tactic] = (),
                clip: float | None = None) -> list[History]:
    """Train the blocks of `model` in place, one after the other, for `steps` optimizer steps each; the history of each.

    rules: quantize by these, each block when its turn comes (what lies outside of the blocks at once); None: the model is quantized already.
    loss: (answer, target) -> a mean, of tensors (rows, ..., features); with a third argument, a mask, where the task's batches have padding.
    train: globs on parameter names within a block. optimizer, schedule, tactics, clip: as in `fit`, of each block by itself.
    batches: of the task, its first, which go through the blocks. packed: a finished block keeps codes only. within: where to look for blocks.
    streams: a directory for the two streams; None keeps them in memory.

    Raises:
        QuantError: blocks that are not there, or do not stand one behind the other. RuleError, FormatError: as `quantize`. RunError, CheckpointError:
        as `fit`.
    """
    decision = None if rules is None else _decided(model, rules, task)
    if decision is not None:
        _outside(model, decision, task, within)
    walk = Walk(model, task, batches, within=within, directory=streams)
    histories = []
    for i, name in enumerate(walk.names):
        walk.fork()
        with full_precision(walk.block(i)):
            walk.push(i, walk.full)
        if decision is not None:
            decision.carry_out(model, lambda layer, name=name: layer.startswith(f"{name}."))  # type: ignore[misc]
        block = walk.block(i)
        _calibrate(walk, i)
        types = {n: p.dtype for n, p in block.named_parameters()}
        home = next(block.parameters()).device
        histories.append(fit(block, BlockTask(task, walk, i, walk.full, loss), train=train, optimizer=optimizer, schedule=schedule, steps=steps,
                             tactics=tactics, clip=clip))
        _narrow(block, types)
        block.to(home)
        if packed:
            artefact.put(block, artefact.packed(block))
        walk.push(i, walk.quantized)
    walk.close()
    if decision is not None:
        decision.close()
    model.eval()
    return histories


def _decided(model: nn.Module, rules: str | Sequence[Rule], task: Task) -> Decision:
    """What the rules say of the whole model, with everything refused now that would be refused at the last block."""
    decision = decided(model, rules, task)
    if decision.inside:
        raise RuleError(f"{next(iter(decision.inside))} has quantized signals inside attention, which rules give to a whole model only: call "
                        "quantize(model, rules, task) first, then reconstruct without rules")
    Coverage(unreached=[name for name in describe(model).unreached if name.removesuffix(".weight") not in decision.layers]).check()
    return decision


def _outside(model: nn.Module, decision: Decision, task: Task, within: str) -> None:
    """Quantize what lies outside of the blocks."""
    doors = tuple(f"{name}." for name, _ in blocks(model, within))
    decision.carry_out(model, lambda layer: not layer.startswith(doors))
    if pending(model):
        task.calibrate(model)


def _calibrate(walk: Walk, i: int) -> None:
    """Settle static activations of a block on what the quantized blocks before it give."""
    block = walk.block(i)
    if pending(block):
        settle(block, lambda: [{"k": k} for k in range(min(walk.count, CALIBRATION))],
               lambda batch: run_block(block, walk.call(i, batch["k"], walk.quantized[batch["k"]].to(next(block.parameters()).device))))


@torch.no_grad()
def _narrow(block: nn.Module, types: dict[str, torch.dtype]) -> None:
    """What training widened, norms and biases of a model in less than fp32, goes back; masters and scales stay."""
    masters = {id(layer.weight) for layer in block.modules() if isinstance(layer, Layer) and isinstance(getattr(layer, "weight", None), nn.Parameter)}
    for name, parameter in block.named_parameters():
        if parameter.dtype != types.get(name, parameter.dtype) and id(parameter) not in masters:
            parameter.data = parameter.data.to(types[name])
