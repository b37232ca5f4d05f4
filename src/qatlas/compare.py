"""Compare: several papers on one task, with one budget, one data order and one evaluation. What comes out is the table that the field lacks.

    run 1 ... run n = papers x bits x seeds      each: load, the paper, judge, pack, weigh; kept as one small JSON file
    trials.json, table.md, comparison.png, report.html

An entry is a paper's name, or a name with arguments of its own, "lsq:group=64,distil=true"; `shared` are arguments for all papers that have them.
Equal are: model, text and its order for each seed, optimizer steps, batch, judgement. Unequal is what the method is, and what its defaults say: a
learning rate that one paper tuned for itself is an advantage, so `shared` may set one for all. Bits that a paper does not speak of are a refused
cell, not a silent one.

The entry "plain" trains the model in full precision for as many steps by labels: what a longer training alone does. A run that is there is not
repeated, a run that was killed goes on from its resume point.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from . import papers
from .core.error import CheckpointError, QatlasError, QuantError, RuleError, RunError
from .keep import place
from .model.coverage import describe
from .model.pack import pack
from .prepare import Job, prepare
from .record import Record, Watch
from .report import compared
from .report.numbers import METRICS
from .train.evaluate import evaluate
from .train.fit import fit
from .train.optim import AdamW
from .train.run import Run
from .train.schedule import cosine
from .train.task import Task
from .trial import Trial, Trials

PLAIN = "plain"


@dataclass(frozen=True)
class Entry:
    """A paper and arguments of its own.

    >>> Entry.read("lsq:group=64,distil=true")
    Entry(name='lsq:group=64,distil=true', paper='lsq', arguments={'group': 64, 'distil': True})
    """

    name: str
    paper: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Entry:
        """From "paper" or "paper:key=value,key=value".

        Raises:
            RunError: no such paper, or what is no argument of it.
        """
        paper, _, rest = text.partition(":")
        given = read_arguments(rest)
        takes = parameters(paper)
        if wrong := [key for key in given if key not in takes]:
            raise RunError(f"{text}: {paper} has no argument {wrong[0]!r}; it has {', '.join(takes)}")
        return cls(text, paper, given)


def read_arguments(text: str | None) -> dict[str, Any]:
    """ "a=1,b=true" -> {"a": 1, "b": True}.

    Raises:
        RunError: a part without "=".
    """
    given = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise RunError(f"{part!r} is no argument; write key=value, with commas between them")
        number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)            # YAML reads 1e-3 as a word
        given[key.strip()] = float(value) if number else yaml.safe_load(value)
    return given


def plain(model: nn.Module, task: Task, *, lr: float = 3e-4, warmup: float = 0.05, steps: int = 400) -> nn.Module:
    """The control: the full-precision model, trained by labels for as long."""
    fit(model, task, optimizer=AdamW(lr=lr), schedule=cosine(warmup), steps=steps)
    return model


def function(paper: str) -> Callable[..., nn.Module]:
    """A paper's function, or the control's."""
    return plain if paper == PLAIN else papers.paper(paper)


def parameters(paper: str) -> dict[str, Any]:
    """The arguments of a paper: name -> default."""
    return {p.name: p.default for p in inspect.signature(function(paper)).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def compare(entries: Sequence[str], job: Job, bits: Sequence[float], steps: int, seeds: int = 3, shared: dict[str, Any] | None = None,
            against: str | None = None, command: str = "", say: Callable[[str], None] = lambda line: None) -> Trials:
    """Run all that is not there yet in `job.out`, write table, figure and page, and return the trials.

    against: the entry that the others are held against, at the same bits; by default the first but "plain", which has none.

    Raises:
        RunError: no directory, no such paper, an argument that no entry has, another comparison in the directory.
    """
    if job.out is None:
        raise RunError("a comparison is many runs that are kept: give --out DIR")
    wanted, shared = [Entry.read(text) for text in dict.fromkeys(entries)], dict(shared or {})
    if against is not None and against not in [entry.name for entry in wanted]:
        raise RunError(f"against={against!r} is none of the entries: {', '.join(entry.name for entry in wanted)}")
    base = next((entry.name for entry in wanted if entry.paper != PLAIN), PLAIN)
    for key in shared:
        if not any(key in parameters(entry.paper) for entry in wanted):
            raise RunError(f"shared argument {key!r}: none of these papers has it")
    out = Path(job.out)
    _claim(out, {"model": job.model, "data": job.data, "task": job.task, "length": job.length, "batch": job.batch, "steps": steps})
    full, size = _full(out, job, say)
    metric = next((m for m in METRICS if m.name in full), None)
    if metric is None:
        raise RunError(f"the task of {job.data} gives no score to compare: {', '.join(full) or 'nothing'}")
    found = Trials(job.model, job.data, metric.name, metric.lower, full, size, against or base, command,
                   claims={e.name: str(getattr(papers.module(e.paper), "CLAIM", "")) for e in wanted if e.paper != PLAIN})
    for seed in range(seeds):
        for entry in wanted:
            for b in ([32.0] if entry.paper == PLAIN else bits):
                found.trials.append(one(out, entry, b, seed, steps, shared, job, say))
    compared(found, out)
    return found


def one(out: Path, entry: Entry, bits: float, seed: int, steps: int, shared: dict[str, Any], job: Job, say: Callable[[str], None]) -> Trial:
    """One run, or what is kept of it."""
    takes = parameters(entry.paper)
    arguments = {**{k: v for k, v in shared.items() if k in takes}, **entry.arguments, "steps": steps}
    if entry.paper != PLAIN:
        arguments["bits"] = int(bits) if bits == int(bits) else bits
    left = tuple(key for key in (*shared, "steps", "bits") if key not in takes and not (entry.paper == PLAIN and key == "bits"))
    arguments = {key: value for key, value in arguments.items() if key in takes}
    trial = Trial(entry.name, bits, seed, _command(entry.paper, arguments, seed, job), entry.paper, arguments, left=left)
    kept = out / "runs" / f"{re.sub(r'[^A-Za-z0-9.=]+', '-', entry.name)}-{bits:g}-s{seed}.json"
    if kept.is_file():
        return _kept(kept, trial)
    say(f"{entry.name}, {bits:g} bits, seed {seed}")
    if not (refused := _refused(entry, arguments)):
        try:
            trial = _run(out / "state" / kept.stem, trial, job)
        except (QuantError, RuleError) as error:                  # numbers that do not go with this model; all else is no answer and stops
            refused = f"{type(error).__name__}: {error}"
    if refused:
        trial = replace(trial, refused=refused)
        say(refused)
    _write(kept, asdict(trial))
    return trial


def _refused(entry: Entry, arguments: dict[str, Any]) -> str:
    """What the paper itself says of its arguments, before a model is loaded."""
    try:
        papers.check(entry.paper, arguments) if entry.paper != PLAIN else None
    except QatlasError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _run(state: Path, trial: Trial, job: Job) -> Trial:
    control = Run(state, seed=trial.seed, resume=state.is_dir(), precision=job.precision, micro=job.micro, save_every=job.save_every,
                  compile=job.compile)
    record = Record(trial.paper, trial.arguments, trial.command)
    control.tactics = (Watch(record),)
    torch.manual_seed(trial.seed)
    model, tokenizer, task = prepare(replace(job, out=None, seed=trial.seed), control, train=True)
    model = function(trial.paper)(model, task, **trial.arguments)
    record.scores["trained"] = evaluate(model, task)
    mean = 32.0 if trial.paper == PLAIN else describe(model, task.probe()).bits
    size = 2 * sum(p.numel() for p in model.parameters()) if trial.paper == PLAIN else _weigh(model, tokenizer)
    control.finish()
    return replace(trial, scores=record.scores, mean=mean, bytes=size, seconds=sum(_typical(h.seconds) for h in control.histories),
                   steps=sum(len(h.loss) for h in control.histories), items=round(sum(sum(h.tokens) for h in control.histories)))


def _typical(seconds: Sequence[float]) -> float:
    """The time of all steps if each took the median's: what else runs on the machine for a while does not count."""
    return statistics.median(seconds) * len(seconds) if seconds else 0.0


def _weigh(model: nn.Module, tokenizer: Any) -> int:
    """Bytes of the packed model's file."""
    with tempfile.TemporaryDirectory() as beside:
        place(pack(model), Path(beside), tokenizer)
        return (Path(beside) / "model.safetensors").stat().st_size


def _full(out: Path, job: Job, say: Callable[[str], None]) -> tuple[dict[str, float], int]:
    """Metrics and bytes (16 bits a weight) of the model as it is."""
    kept = out / "runs" / "full-precision.json"
    if not kept.is_file():
        say("judging the model in full precision")
        model, _, task = prepare(replace(job, out=None), Run(None, progress=False), train=True)
        _write(kept, {"scores": evaluate(model, task), "bytes": 2 * sum(p.numel() for p in model.parameters())})
    told = json.loads(kept.read_text(encoding="utf-8"))
    return told["scores"], told["bytes"]


def _claim(out: Path, setting: dict[str, Any]) -> None:
    """Refuse a directory that holds a comparison under other conditions."""
    kept = out / "runs" / "setting.json"
    if kept.is_file():
        was = json.loads(kept.read_text(encoding="utf-8"))
        if other := [key for key in setting if was.get(key) != setting[key]]:
            raise RunError(f"{out} holds a comparison with {other[0]}={was.get(other[0])!r}, not {setting[other[0]]!r}: what was run there cannot be "
                           "compared with what would be; give another --out")
    elif out.is_dir() and any(path.name not in ("runs", "state") for path in out.iterdir()):
        raise RunError(f"{out} holds other things; give --out a directory of its own")
    _write(kept, setting)


def _kept(kept: Path, trial: Trial) -> Trial:
    """The run of a file, if it is the same run."""
    try:
        told = json.loads(kept.read_text(encoding="utf-8"))
        found = Trial(**{**told, "left": tuple(told["left"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{kept} is not a run of a comparison: {error}; remove it to run it again") from None
    if found.arguments != trial.arguments:
        raise RunError(f"{kept} was run with {found.arguments}, not {trial.arguments}; remove it to run it again, or give another --out")
    return found


def _write(path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(told, indent=1), encoding="utf-8")
    os.replace(aside, path)


def _command(paper: str, arguments: dict[str, Any], seed: int, job: Job) -> str:
    """The `qatlas run` that does the same alone."""
    if paper == PLAIN:
        return ""
    told = {**arguments, "model": job.model, "data": job.data, "task": job.task, "length": job.length, "batch": job.batch, "seed": seed}
    return shlex.join(["qatlas", "run", paper, *(f"--{key}={value}" for key, value in told.items() if value is not None)])
