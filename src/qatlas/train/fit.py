"""fit: THE loop. Accumulation, precision, clipping, resume points and logging are all it knows; whatever else a method does is a loss, an optimizer
or a tactic.

The global batch of a step is `task.batch(step)`. Each rank takes its rows, cut into micro-batches; the loss of a micro-batch is weighted by its
number of counted items (tokens with a label, rows) over that of the whole batch, so that

    sum_i  w_i / W  loss_i  =  the loss of the whole batch

however the batch is cut, also where answers are of unequal length; no rank needs to ask another, since all know the whole batch. A weight is
quantized once between two writes, however many micro-batches there are. Masters are fp32: trained parameters in less are widened. The random state of
the process is set from (seed, phase, rank) inside and given back afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from ..core.error import RunError
from ..kernels.compiled import compiled
from ..layers.ahead import traced
from ..layers.gathered import gathering, waits
from ..layers.quantized import kept
from .optim import AdamW, Optimizer, only, set_rates, trained
from .plan import TRIED, Cost, cost
from .point import point_of
from .ranks import asked, shared, unsynced, whole
from .resume import Phase, Point, described, fingerprint, load_optimizer, load_random, load_state, random_state
from .run import Run, agreed, bar, check_precision, said
from .schedule import constant
from .tactic import History, Loop, Loss, Pass, Tactic
from .task import Batch, Task, moved


def fit(model: nn.Module, task: Task, *, train: str | Sequence[str] = "*", optimizer: Optimizer | None = None,
        schedule: Callable[[float], float] | None = None, steps: int, loss: Loss | None = None, tactics: Sequence[Tactic] = (),
        clip: float | None = 1.0) -> History:
    """Train `model` in place for `steps` optimizer steps; it ends in eval mode.

    train: globs on parameter names; what fits none is frozen meanwhile. schedule: progress (0 to 1) -> factor on the learning rates.
    loss: (model, batch) -> a mean over the batch's items, in place of the task's. clip: the largest norm of the gradient, or None.

    Raises:
        RunError: a loss or gradient that is not finite, two tactics with passes, bf16 on a chip without. RuleError: a glob that fits nothing.
        CheckpointError: a resume point that is not of this run.
    """
    if steps < 1:
        raise RunError(f"steps={steps}: a fit needs at least one step")
    run, optimizer, schedule, objective = task.run, optimizer or AdamW(), schedule or constant(), loss or task.loss
    if run.plan is not None:
        return _try(model, task, run.plan, train=train, optimizer=optimizer, schedule=schedule, steps=steps, loss=loss, tactics=tactics, clip=clip)
    tactics = (*tactics, *run.tactics)
    accelerator = Accelerator(mixed_precision="no", log_with="tensorboard" if run.tensorboard else None, project_dir=run.out)
    check_precision(run.precision, accelerator.device)
    trained(model, train) if not tactics else None                # a wrong glob fails before anything moves
    phase = run.phase("fit", {
        "model": fingerprint(model), "task": task.fingerprint, "train": described(train), "optimizer": described(optimizer),
        "schedule": described(schedule), "steps": steps, "loss": described(loss), "tactics": described(list(tactics)), "clip": clip})
    point = phase.read()
    model.to(accelerator.device)
    loop = Loop(model, task, steps, accelerator)
    gradients, outside = [(p, p.requires_grad) for p in model.parameters()], random_state()
    try:
        set_seed(hash((run.seed, phase.number, accelerator.process_index)) % 2**32)
        _begin(loop, train, tactics, point)
        if point is None or not point.finished:
            gathers = run.compile == "quant" and accelerator.num_processes == 1
            with _quick(model, run), kept(model, not asked(accelerator)), gathering(model, gathers), shared(accelerator, model, tactics) as wrapped:
                _equip(loop, train, optimizer, point)
                _steps(loop, wrapped, run, phase, schedule, objective, tactics, clip)
            phase.write(point_of(loop, tactics, finished=True)) if accelerator.is_main_process else None
    finally:
        load_random(outside)
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
            parameter.grad = None
    accelerator.wait_for_everyone()
    model.eval()
    run.histories.append(loop.history)
    return loop.history


@contextmanager
def _quick(model: nn.Module, run: Run) -> Iterator[None]:
    """Compiled as far as the run says, and how long it took."""
    with ExitStack() as stack:
        began = time.perf_counter()
        if run.compile != "no":
            stack.enter_context(compiled(model))
            said(run, f"compiled the fake quantization in {time.perf_counter() - began:.1f} s")
        stack.enter_context(traced(model)) if run.compile == "step" else None
        yield


def _try(model: nn.Module, task: Task, costs: list[Cost], *, steps: int, **arguments: Any) -> History:
    """A few steps in place of all: of a planned run."""
    real, task.run = task.run, Run(None, seed=task.run.seed, precision=task.run.precision, micro=task.run.micro, progress=False,
                                   compile=task.run.compile)
    try:
        history = fit(model, task, steps=min(steps, TRIED), **arguments)
    finally:
        task.run = real
    costs.append(cost(history, steps))
    task.run.histories.append(history)
    return history


def _begin(loop: Loop, train: str | Sequence[str], tactics: Sequence[Tactic], point: Point | None) -> None:
    """Structure, then weights."""
    for tactic in tactics:
        tactic.start(loop)
    if point is not None:
        for i, (tactic, state) in enumerate(zip(tactics, point.plain["tactics"], strict=True)):
            own = {name.partition(".")[2]: t for name, t in point.tensors.get("tactics.safetensors", {}).items() if name.startswith(f"{i}.")}
            tactic.load_state_dict({**state, **own})
        widen(trained(loop.model, train))                        # what was saved is fp32 already
        load_state(loop.model, point.tensors["model.safetensors"])
        loop.step, loop.history = point.step, History(**point.plain["history"])
    chosen = trained(loop.model, train)
    for parameter in loop.model.parameters():
        parameter.requires_grad_(parameter in chosen)
    widen(chosen)
    loop.refresh()


def _equip(loop: Loop, train: str | Sequence[str], optimizer: Optimizer, point: Point | None) -> None:
    """The optimizer, then its moments and the random states; of a process that the point does not know, the seed's."""
    loop.names = trained(loop.model, train)
    loop.optimizer = optimizer.build(loop.model, loop.names)
    if point is not None:
        load_optimizer(loop.optimizer, loop.names, point.tensors["optimizer.safetensors"], point.plain["optimizer"])
        states, rank = point.tensors["rng.safetensors"], loop.accelerator.process_index
        load_random({name: t[rank] for name, t in states.items()}) if rank < len(states["torch"]) else None


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Masters are fp32: parameters in less become so."""
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _steps(loop: Loop, wrapped: nn.Module, run: Run, phase: Phase, schedule: Callable[[float], float], objective: Loss,
           tactics: Sequence[Tactic], clip: float | None) -> None:
    accelerator = loop.accelerator
    loop.model.train()
    if run.tensorboard:
        _curves(accelerator)
    first = loop.step
    with bar(loop.task.title, loop.steps, run.progress and accelerator.is_main_process, loop.step) as advance:
        for step in range(loop.step, loop.steps):
            loop.step, began = step, time.perf_counter()
            set_rates(loop.optimizer, schedule(loop.progress))
            loop.batch = moved(loop.task.batch(step), accelerator.device)
            value, norm = _step(loop, wrapped, run, objective, tactics, clip)
            rate, items = loop.optimizer.param_groups[0]["lr"], loop.task.weight(loop.batch)
            loop.history.add(loss=value, lr=rate, grad_norm=norm, seconds=time.perf_counter() - began, tokens=items)
            if run.tensorboard:
                accelerator.log({"loss": value, "lr": rate, "grad_norm": norm}, step=step)
            advance(f"loss {value:.4g}")
            if run.compile == "step" and step == first:
                said(run, f"compiled the step in {time.perf_counter() - began:.1f} s, its first run among them")
            loop.step = step + 1
            if agreed(accelerator, phase.due(step + 1)) and step + 1 < loop.steps:
                point = point_of(loop, tactics)
                phase.write(point) if accelerator.is_main_process else None
    if run.tensorboard:
        accelerator.end_training()


def _step(loop: Loop, wrapped: nn.Module, run: Run, objective: Loss, tactics: Sequence[Tactic], clip: float | None) -> tuple[float, float]:
    """One step: mean loss over its passes, norm of the last gradient."""
    for tactic in tactics:
        tactic.before(loop)
    asked = [found for tactic in tactics if (found := tactic.passes(loop)) is not None]
    if len(asked) > 1:
        raise RunError("two tactics want to say which passes a step consists of; only one can")
    passes = asked[0] if asked else [Pass()]
    losses, norm = [], 0.0
    for loop.turn, part in enumerate(passes):
        part.enter(loop) if part.enter is not None else None
        loop.refresh()
        loop.optimizer.zero_grad() if part.fresh else None
        losses.append(_backward(loop, wrapped, run, part.loss or objective, tactics))
        for tactic in tactics:
            tactic.grads(loop)
        grads = [p for p in loop.names if p.grad is not None]
        norm = float(whole(nn.utils.clip_grad_norm_(grads, math.inf if clip is None else clip)))
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise RunError(f"step {loop.step}: the loss is {losses[-1]}, the norm of the gradient {norm}. Lower the learning rate, warm up, "
                           "or look for a layer with too few bits; the weights are those before this step")
        with only(loop.optimizer, part.steps):
            loop.optimizer.step() if part.steps != () else None
        loop.refresh() if part.steps != () else None
    loop.optimizer.zero_grad()
    for tactic in tactics:
        tactic.after(loop)
        loop.refresh()
    return sum(losses) / len(losses), norm


def _backward(loop: Loop, wrapped: nn.Module, run: Run, objective: Loss, tactics: Sequence[Tactic]) -> float:
    """Forward and backward over this rank's micro-batches; the loss of the global batch."""
    accelerator, task = loop.accelerator, loop.task
    ranks, rank, rows = accelerator.num_processes, accelerator.process_index, len(next(iter(loop.batch.values())))
    if rows < ranks:
        raise RunError(f"a batch of {rows} rows cannot be shared by {ranks} processes; give a larger batch")
    mine = range(rank * rows // ranks, (rank + 1) * rows // ranks)
    most, counted = -(-rows // ranks), max(task.weight(loop.batch), 1)
    size, total = run.micro or most, torch.zeros((), device=accelerator.device)
    turns = -(-most // size)                                      # as many on each rank: under FSDP2 every forward is a meeting
    for turn in range(turns):
        first = mine.start + turn * size
        ours = slice(first, min(first + size, mine.stop)) if first < mine.stop else slice(mine.stop - 1, mine.stop)
        part: Batch = {name: value[ours] for name, value in loop.batch.items()}
        with unsynced(accelerator, wrapped, turn + 1 < turns), waits(loop.model, turn + 1 < turns):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                value = objective(wrapped, part)
                for tactic in tactics:
                    value = tactic.loss(loop, value, part)
            share = task.weight(part) / counted if first < mine.stop else 0.0      # a rank that is done goes on with a row that counts nothing
            accelerator.backward(value * (share * ranks))         # ranks: DDP and FSDP2 take the mean of what is meant as a sum
            total += value.detach() * share
    return float(accelerator.reduce(total, "sum"))


def _curves(accelerator: Accelerator) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise RunError("curves need TensorBoard: pip install 'qatlas[tensorboard]', or run without tensorboard=True") from None
    accelerator.init_trackers("tensorboard")
