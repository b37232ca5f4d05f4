"""Run: what all papers share that is not data: the seed, the precision, where to save, whether to resume.

A run counts its phases. The verbs ask for their phase (`run.phase`), so a paper's function needs no code for resuming; see resume.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.error import RunError
from .resume import Phase

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .plan import Cost
    from .tactic import History, Tactic

LEFT = ("state", "record.json", "model*.safetensors", "config.json", "tokenizer.json", "report.html", "exports")     # a run, or another model
PRECISIONS = ("no", "bf16")
COMPILES = ("no", "quant", "step")


class Run:
    """The settings of one run.

    out: the directory of all that the run leaves behind; None keeps nothing.
    seed: of batches, dropout and all else that is drawn.
    resume: go on from out/state.
    precision: "no" computes in fp32; "bf16" multiplies in bfloat16 (autocast), masters and moments stay fp32.
    compile: "quant" compiles the fake quantization and nothing else (kernels/compiled.py): the values are those of "no", bit for bit, in less time;
    and a weight hears its micro-batches' gradients at once (layers/gathered.py): sums of a scale's gradient differ in their last bits. "step"
    compiles the whole of forward and backward besides (layers/ahead.py): minutes before the first step, and sums in the compiler's order.
    micro: rows of one forward on one device; None takes a rank's whole share of the batch. Smaller needs less memory; the
    loss is the same but for what is measured in each forward (a fresh scale of a whole tensor) and for imitation in Chat, whose terms count rows.
    save_every: steps between resume points; None writes one every `save_seconds`.
    tactics: join those of every fit (a watch, a logger); set after making. histories: of the fits so far. plan: None; a list makes each fit note
    there what it would cost, after a few steps, without the tactics of the run.
    progress: a progress bar, where standard error is a terminal; else a line each tenth of the steps. tensorboard: curves in out/tensorboard.

    Raises:
        RunError: an output directory that holds another run; a setting that does not exist.
    """

    def __init__(self, out: str | Path | None = None, *, seed: int = 0, resume: bool = False, precision: str = "no", micro: int | None = None,
                 save_every: int | None = None, save_seconds: float = 60.0, progress: bool = True, tensorboard: bool = False,
                 compile: str = "no") -> None:
        self.out = None if out is None else Path(out)
        self.seed, self.resume, self.precision, self.micro, self.progress, self.tensorboard = seed, resume, precision, micro, progress, tensorboard
        self.save_every, self.save_seconds, self.phases = save_every, save_seconds, 0
        self.compile = compile
        self.tactics: tuple[Tactic, ...] = ()
        self.histories: list[History] = []
        self.plan: list[Cost] | None = None
        if precision not in PRECISIONS:
            raise RunError(f"there is no precision {precision!r}; there are {', '.join(PRECISIONS)}")
        if compile not in COMPILES:
            raise RunError(f"there is no compile={compile!r}; there are {', '.join(COMPILES)}")
        for name, value in (("micro", micro), ("save_every", save_every)):
            if value is not None and value < 1:
                raise RunError(f"{name}={value}: give a positive number, or None")
        if tensorboard and out is None:
            raise RunError("tensorboard curves need an output directory: give out=")
        if resume and out is None:
            raise RunError("there is nothing to resume without a directory: give out= (--out), where the run was")
        if self.out is not None:
            self._claim(self.out)

    def phase(self, verb: str, arguments: dict[str, Any]) -> Phase:
        """The next phase, with the signature that its resume points must have."""
        self.phases += 1
        directory = None if self.out is None else self.out / "state" / f"phase-{self.phases:02d}"
        signature = {"verb": verb, "phase": self.phases, "seed": self.seed, "precision": self.precision, "micro": self.micro,
                     "compile": self.compile, **arguments}
        return Phase(directory, self.phases, signature, self.save_every, self.save_seconds)

    def finish(self) -> None:
        """The run ended well and its results are saved: remove the resume points."""
        if self.out is not None and (self.out / "state").is_dir():
            gone = self.out / ".state"
            shutil.rmtree(gone, ignore_errors=True)
            (self.out / "state").rename(gone)                     # at one stroke: half a state would look like a broken one
            shutil.rmtree(gone)

    def _claim(self, out: Path) -> None:
        if out.exists() and not out.is_dir():
            raise RunError(f"{out} is a file; give a directory")
        found = sorted({path.name for name in LEFT for path in out.glob(name)})
        if found and not self.resume:
            advice = "continue it with resume=True (--resume), or " if "state" in found else ""
            raise RunError(f"{out} holds another run or model ({', '.join(found)}); {advice}give another output directory. Nothing was overwritten")
        if self.resume and found and "state" not in found:
            raise RunError(f"{out} holds a run that ended ({', '.join(found)}): there is nothing to resume. Give another output directory")


@contextmanager
def bar(title: str, total: int, wanted: bool = True, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar where standard error is a terminal, else plain lines; yields a function to call once a step with a short text."""
    if not wanted:
        yield lambda text: None
        return
    if not sys.stderr.isatty():
        yield _lines(title, total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True)) as shown:
        line = shown.add_task(title, total=total, completed=done, text="")
        yield lambda text: shown.update(line, advance=1, text=text)


def _lines(title: str, total: int, done: int) -> Callable[[str], None]:
    """A line each tenth of the steps: a log says that the run lives, and how long it will."""
    began, step = time.perf_counter(), done

    def advance(text: str) -> None:
        nonlocal step
        step += 1
        if step * 10 // total > (step - 1) * 10 // total:
            left = (time.perf_counter() - began) / (step - done) * (total - step)
            sys.stderr.write(f"  {title}: {step} of {total}{', ' * bool(text)}{text}, {left:,.0f} s left\n")
            sys.stderr.flush()
    return advance


def said(run: Run, text: str) -> None:
    """A line beside the bar, where there is one."""
    if run.progress:
        sys.stderr.write(f"  {text}\n")
        sys.stderr.flush()


def check_precision(precision: str, device: torch.device) -> None:
    """Raise RunError where bf16 is asked of a chip without it."""
    if precision != "bf16":
        return
    if device.type == "cpu":
        asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        able = any(ask() for ask in asked if ask is not None)
    else:
        able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not able:
        raise RunError(f"this {device.type} computes no bfloat16 (it would be emulated, several times slower than fp32); take precision='no'")


def gathered(accelerator: Accelerator, state: Tensor) -> Tensor:
    """(n,) on each rank -> (ranks, the longest n)."""
    if accelerator.num_processes == 1:
        return state[None]
    padded = accelerator.pad_across_processes(state[None].to(accelerator.device), dim=1)
    return accelerator.gather(padded).cpu()


def agreed(accelerator: Accelerator, due: bool) -> bool:
    """The first rank's word, on all ranks: clocks differ."""
    if accelerator.num_processes == 1:
        return due
    return bool(accelerator.reduce(torch.tensor(float(due and accelerator.is_main_process), device=accelerator.device), "sum"))
