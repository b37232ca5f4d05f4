"""The main job: a model goes in, a smaller one comes out, with proof.

    load -> judge in full precision -> the paper (quantize, judge, train) -> judge -> pack -> export -> read back -> report

`Job` (see prepare) is what all papers share and no paper repeats: the model, the data, the target, the directory, the seed. A paper's own arguments
are those of its function. `run` is what `qatlas run` and `qatlas demo` call; `plan` tries a few steps. A model that the target does not know is
refused before anything is judged, numbers that it cannot hold before anything is trained.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import papers
from .core.error import DataError, RunError
from .export import files
from .export import target as find_target
from .keep import export, folder, place, size
from .model.coverage import describe
from .model.exportable import holders
from .model.foreign import told as told_foreign
from .model.pack import pack
from .model.verify import verify
from .prepare import Job, prepare
from .record import Record, Watch, moved_scales, peak_memory, weight_errors
from .report import report
from .train.evaluate import evaluate
from .train.run import Run
from .train.task import Task

PROMPTS = ("The with statement", "This function returns")


@dataclass
class Outcome:
    """What a run gives back: the packed model, its tokenizer, the record, and the directory (None if nothing was kept)."""

    model: nn.Module
    tokenizer: Any
    record: Record
    out: Path | None


def run(name: str, arguments: dict[str, Any], job: Job, command: str = "", say: Callable[[str], None] = lambda line: None,
        others: Mapping[str, dict[str, Any]] | None = None) -> Outcome:
    """Run a paper on a job. `say` is told each stage. others: stage -> other arguments of the paper, trained and judged before, for comparison only.

    Raises:
        QatlasError: whatever the user can mend.
    """
    paper = papers.paper(name)
    find_target(job.target) if job.target else None               # a wrong target fails before a model is loaded, and so do a paper's arguments
    papers.check(name, arguments, job.target)
    torch.set_num_threads(job.threads) if job.threads else None
    record = Record(name, arguments, command, job.model, job.data, target=job.target, seed=job.seed, job=vars(job))
    control = Run(job.out, seed=job.seed, resume=job.resume, precision=job.precision, micro=job.micro, save_every=job.save_every,
                  tensorboard=job.tensorboard, compile=job.compile)
    control.tactics = (Watch(record, job.watch),)
    torch.manual_seed(job.seed)
    with _timed(record, "load"):
        say(f"loading {job.model}")
        if note := told_foreign(job.model):
            say(note)
        model, tokenizer, task = prepare(job, control, say, train=True)
    record.fingerprint = task.fingerprint
    with _timed(record, "full precision"):
        say("judging it in full precision")
        record.scores["full precision"] = evaluate(model, task)
    record.sizes["full precision"] = 2 * sum(p.numel() for p in model.parameters())
    _sample(record, "full precision", model, tokenizer)
    for stage, given in (others or {}).items():
        _compare(record, stage, name, given, job, say)
    with _timed(record, "trained"):
        say(told(name, arguments))
        model = paper(model, task, **arguments)
    _describe(record, model, task, control)
    with _timed(record, "trained"):
        say("judging the trained model")
        record.scores["trained"] = evaluate(model, task)
    return _keep(record, model, tokenizer, task, job, control, say)


def told(name: str, arguments: dict[str, Any]) -> str:
    """A paper and its arguments in a line."""
    return f"{name}: {', '.join(f'{key}={value}' for key, value in arguments.items() if value is not None)}"


def _compare(record: Record, stage: str, name: str, arguments: dict[str, Any], job: Job, say: Callable[[str], None]) -> None:
    """Train the same model on the same data with other arguments, and note its score."""
    say(f"for comparison, {stage}: {told(name, arguments)}")
    out = None if job.out is None else Path(job.out) / "state" / re.sub(r"\W+", "-", stage)
    control = Run(out, seed=job.seed, resume=job.resume and out is not None and out.exists(), precision=job.precision, micro=job.micro,
                  save_every=job.save_every, compile=job.compile)
    control.tactics = (Watch(record, 0),)
    torch.manual_seed(job.seed)
    with _timed(record, stage):
        model, _, task = prepare(job, control, train=True)
        model = papers.paper(name)(model, task, **arguments)
        record.scores[stage] = evaluate(model, task)


def _keep(record: Record, model: nn.Module, tokenizer: Any, task: Task, job: Job, control: Run, say: Callable[[str], None]) -> Outcome:
    """Pack, save, export, read back, report."""
    with _timed(record, "packed"):
        say("packing")
        model = pack(model)
        record.scores["packed"] = evaluate(model, task)
    _sample(record, "packed", model, tokenizer)
    out = control.out
    if out is None:
        return Outcome(model, tokenizer, record, None)
    out.mkdir(parents=True, exist_ok=True)
    written = place(model, out, tokenizer)
    record.sizes["packed"] = (out / "model.safetensors").stat().st_size
    if job.target:
        with _timed(record, job.target):
            say(f"exporting to {job.target}")
            shutil.rmtree(folder(out, job.target), ignore_errors=True)      # of a run that was killed here; any other was refused at the start
            artefact = export(out, job.target, model)
            written += files(artefact)
            record.sizes[job.target] = size(artefact)
    with _timed(record, "read back"):
        say("reading back")
        record.proofs = [vars(proof) for proof in verify(out, trained=model)]
    record.seal(out, *written)
    record.write(out)
    report(record, out / "report.html")
    control.finish()
    return Outcome(model, tokenizer, record, out)


def plan(name: str, arguments: dict[str, Any], job: Job) -> dict[str, Any]:
    """What a run would do: coverage, refusals, steps, tokens, memory and time expected. A few steps of each phase are tried; nothing is written.

    Seconds are of loading, judging and training; packing, exporting and reading back are left out. Memory is the largest up to the trained model.

    Raises:
        QatlasError: what would stop the run.
    """
    paper = papers.paper(name)
    find_target(job.target) if job.target else None
    papers.check(name, arguments, job.target)
    torch.set_num_threads(job.threads) if job.threads else None
    control = Run(None, seed=job.seed, precision=job.precision, micro=job.micro, compile=job.compile)
    costs = control.plan = []
    torch.manual_seed(job.seed)
    (model, _, task), loading = _clocked(lambda: prepare(job, control, train=True))
    parameters = sum(p.numel() for p in model.parameters())       # before scales are added
    _, full = _clocked(lambda: evaluate(model, task))
    model, own = _clocked(lambda: paper(model, task, **arguments))
    if not costs:
        raise RunError(f"the paper {name} trains nothing, so there is nothing to plan")
    _, judging = _clocked(lambda: evaluate(model, task))
    cover, steps = describe(model, task.probe()), sum(cost.steps for cost in costs)
    training = sum(cost.seconds for cost in costs)
    around = own - sum(sum(history.seconds) for history in control.histories)                 # what the paper does outside of its steps
    times = 2 + ((steps - 1) // job.watch if job.watch else 0)    # before the first step, along the way, after the last
    held = f"none: {job.target} holds every tensor" if job.target else "none: no target is asked for"
    also = ", ".join(name for name in holders(model) if name != job.target)
    note = told_foreign(job.model)
    return {"model": job.model, **({"start": note} if note else {}), "parameters": parameters,
            "target": job.target or "the packed directory", "refusals": held, "other targets": also or "none holds all of these numbers",
            "bits": round(cover.bits, 3), "coverage": cover.table(), "signals": cover.inside(),
            "phases": ", ".join(f"{cost.steps} steps" for cost in costs), "steps": steps, "tokens": sum(cost.tokens for cost in costs),
            "seconds a step": training / steps, "training": training, "judging": full + times * judging,
            "seconds": loading + full + around + training + times * judging,
            "peak memory": peak_memory()}


def _clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """The most probable continuation of a prompt, prompt included.

    Raises:
        DataError: a prompt without a token, or no token asked for.
    """
    if tokens < 1:
        raise DataError(f"tokens={tokens}: ask for at least one new token")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    if ids.numel() == 0:
        raise DataError(f"the prompt {prompt!r} has no tokens; give a word to begin with")
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                         pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def _sample(record: Record, stage: str, model: Any, tokenizer: Any) -> None:
    if tokenizer is not None and hasattr(model, "generate") and getattr(model, "can_generate", lambda: False)():
        record.samples[stage] = generate(model, tokenizer, PROMPTS[0])


def _describe(record: Record, model: nn.Module, task: Task, control: Run) -> None:
    cover = describe(model, task.probe())
    record.coverage, record.signals, record.bits = cover.table(), cover.inside(), cover.bits
    record.rules = [rule.to_json() for rule in getattr(model, "qatlas_rules", ())]
    record.history = [dataclasses.asdict(history) for history in control.histories]
    record.rounded = moved_scales(model)
    after = weight_errors(model)
    record.errors = {name: (record.errors.get(name, (error, error))[0], error) for name, error in after.items()}


@contextmanager
def _timed(record: Record, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    record.times[stage] = record.times.get(stage, 0.0) + time.perf_counter() - began
    record.memory[stage] = peak_memory()
