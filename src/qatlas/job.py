"""The main job: a model goes in, a smaller one comes out, with proof.

    load -> judge in full precision -> the paper (quantize, judge, train) -> judge -> pack -> export -> read back -> report

`Job` is what all papers share and no paper repeats: the model, the data, the target, the directory, the seed. A paper's own arguments are those of
its function. `run` is what `qatlas run` and `qatlas demo` call; `plan` stops before training. A model that the target does not know is refused before
anything is judged, numbers that it cannot hold before anything is trained.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import papers
from .core.error import CheckpointError, DataError, RuleError, RunError, unknown
from .core.noun import from_json
from .export import Checkpoint
from .export import target as find_target
from .keep import export, folder, place
from .model.coverage import describe
from .model.load import load, speciality
from .model.pack import pack
from .model.probe import undisturbed
from .model.verify import verify
from .record import Record, Watch, weight_errors
from .report import report
from .train.evaluate import evaluate
from .train.fit import Planned
from .train.labelled import Classification, Images
from .train.run import Run
from .train.task import Chat, LanguageModelling, Task

TASKS = {"lm": LanguageModelling, "chat": Chat, "classification": Classification, "image": Images}
PROMPTS = ("The with statement", "This function returns")


@dataclass
class Job:
    """What all papers share.

    Args:
        model: a hub id, a directory, or zoo:gpt, zoo:vit, zoo:resnet.
        data: a hub id, a file (.txt .md .jsonl .json .csv .parquet .npz), or builtin:docs.
        task: lm, chat, classification or image; auto looks at the model.
        out: the directory of all that the run leaves behind.
        target: the artefact to train for and to write, such as gguf:tq2_0 (`qatlas doctor` lists them); none trains for the packed directory only.
        rules: a JSON file of extra rules, which stand before the paper's.
        seed: of the data order and all else that is drawn.
        resume: go on from the resume points in out.
        length: tokens of a window (lm, chat) or of a sentence.
        batch: rows of an optimizer step.
        micro: rows of one forward; smaller needs less memory and changes nothing else.
        precision: no (fp32) or bf16, where the chip has it.
        watch: judge the model every so many steps; 0 never.
        save_every: steps between resume points; by default one a minute.
        threads: threads of torch; 0 leaves them as they are. A resumed run is bit-identical with the same number.
        tensorboard: write curves to out/tensorboard.
        plan: stop before training and print what would happen.
    """

    model: str = "zoo:gpt"
    data: str = "builtin:docs"
    task: str = "auto"
    out: str | None = None
    target: str | None = None
    rules: str | None = None
    seed: int = 0
    resume: bool = False
    length: int = 256
    batch: int = 8
    micro: int | None = None
    precision: str = "no"
    watch: int = 0
    save_every: int | None = None
    threads: int = 0
    tensorboard: bool = False
    plan: bool = False


@dataclass
class Outcome:
    """What a run gives back: the packed model, its tokenizer, the record, and the directory (None if nothing was kept)."""

    model: nn.Module
    tokenizer: Any
    record: Record
    out: Path | None


def run(name: str, arguments: dict[str, Any], job: Job, command: str = "", say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Run a paper on a job. `say` is told each stage.

    Raises:
        QatlasError: whatever the user can mend.
    """
    paper = papers.paper(name)
    find_target(job.target) if job.target else None               # a wrong target fails before a model is loaded
    torch.set_num_threads(job.threads) if job.threads else None
    record = Record(name, arguments, command, job.model, job.data, target=job.target, seed=job.seed, job=vars(job))
    control = Run(job.out, seed=job.seed, resume=job.resume, precision=job.precision, micro=job.micro, save_every=job.save_every,
                  tensorboard=job.tensorboard)
    control.tactics = (Watch(record, job.watch),)
    torch.manual_seed(job.seed)
    with _timed(record, "load"):
        say(f"loading {job.model}")
        model, tokenizer, task = prepare(job, control)
    record.fingerprint = task.fingerprint
    with _timed(record, "full precision"):
        say("judging it in full precision")
        record.scores["full precision"] = evaluate(model, task)
    record.sizes["full precision"] = 2 * sum(p.numel() for p in model.parameters())
    _sample(record, "full precision", model, tokenizer)
    with _timed(record, "trained"):
        say(f"{name}: {', '.join(f'{key}={value}' for key, value in arguments.items() if value is not None)}")
        model = paper(model, task, **arguments)
    _describe(record, model, task, control)
    with _timed(record, "trained"):
        say("judging the trained model")
        record.scores["trained"] = evaluate(model, task)
    return _keep(record, model, tokenizer, task, job, control, say)


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
            written.append(export(out, job.target, model))
            record.sizes[job.target] = written[-1].stat().st_size
    with _timed(record, "read back"):
        say("reading back")
        record.proofs = [vars(proof) for proof in verify(out, trained=model)]
    record.seal(out, *written)
    record.write(out)
    report(record, out / "report.html")
    control.finish()
    return Outcome(model, tokenizer, record, out)


def plan(name: str, arguments: dict[str, Any], job: Job) -> dict[str, Any]:
    """What a run would do: coverage, refusals, steps, tokens, memory and time expected. Nothing is written.

    Raises:
        QatlasError: what would stop the run.
    """
    paper = papers.paper(name)
    find_target(job.target) if job.target else None
    torch.set_num_threads(job.threads) if job.threads else None
    control = Run(None, seed=job.seed, precision=job.precision, micro=job.micro)
    control.plan = True
    torch.manual_seed(job.seed)
    model, _, task = prepare(job, control)
    parameters = sum(p.numel() for p in model.parameters())       # before scales are added
    try:
        paper(model, task, **arguments)
    except Planned as stop:
        cover = describe(model)
        held = f"none: {job.target} holds every tensor" if job.target else "none: no target is asked for"
        return {"model": job.model, "parameters": parameters, "target": job.target or "the packed directory",
                "refusals": held, "bits": round(cover.bits, 3), "coverage": cover.table(), **stop.estimate}
    raise RunError(f"the paper {name} trains nothing, so there is nothing to plan")


def prepare(job: Job, control: Run) -> tuple[nn.Module, Any, Task]:
    """The model, its tokenizer and the task of a job.

    Raises:
        DataError: a task that does not exist, or that the model has no tokenizer for. CheckpointError: a model that cannot be loaded, or holds NaN.
        FormatError: a target that does not know such a model or such a tokenizer.
    """
    if job.task not in (*TASKS, "auto"):
        raise DataError(unknown("task", job.task, [*TASKS, "auto"]))
    rules = read_rules(job.rules)
    kind = speciality(job.model) if job.task == "auto" else job.task
    model, tokenizer = load(job.model, "lm" if kind == "chat" else kind)
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise CheckpointError(f"{job.model} holds NaN or infinity in {len(broken)} tensors, for instance {broken[0]}; nothing can be trained from it")
    if job.target:
        _check_target(job.target, model, tokenizer)
    if kind == "image":
        images = Images(job.data, batch=job.batch, target=job.target, extra_rules=rules, run=control)
        _check_labels(job, model, images)
        _check_images(job, model, images)
        return model, tokenizer, images
    if tokenizer is None:
        raise DataError(f"{job.model} has no tokenizer, which the task {kind!r} needs; put tokenizer.json beside its weights")
    task = TASKS[kind](job.data, tokenizer, length=job.length, batch=job.batch, target=job.target, extra_rules=rules, run=control)
    _check_labels(job, model, task)
    return model, tokenizer, task


def _check_labels(job: Job, model: nn.Module, task: Task) -> None:
    """Refuse labels that the model's last layer has no place for."""
    asked, has = getattr(task, "classes", 0), getattr(getattr(model, "config", None), "num_labels", 0)
    if asked and has and (asked > has or asked == 1 != has):
        raise DataError(f"{job.data} has labels 0 to {asked - 1}, {job.model} answers with {has} classes; "
                        "take a model with a head for these labels" + (", or labels that are classes" if asked == 1 else ""))


def _check_images(job: Job, model: nn.Module, images: Images) -> None:
    """Refuse images of a size, or with channels, that the model cannot take; only the model knows, so it is asked."""
    batch = images.take(np.arange(1), None)
    try:
        with undisturbed(model), torch.no_grad():
            images.logits(model, batch)
    except (ValueError, RuntimeError) as error:
        shape = " x ".join(map(str, batch["pixel_values"].shape[1:]))
        raise DataError(f"{job.model} cannot take the images of {job.data}, {shape} (channels x height x width): {error}") from None


def _check_target(target: str, model: nn.Module, tokenizer: Any) -> None:
    """Refuse a model or a tokenizer that the target does not know; the layers' numbers are refused by `quantize`."""
    form, kind = find_target(target)
    if not hasattr(form, "plan"):
        return
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save_pretrained(beside) if tokenizer is not None else None
        vocabulary = Path(beside) if (Path(beside) / "tokenizer.json").is_file() else None
        config: Any = getattr(model, "config", None)
        known = config.to_dict() if config is not None else {}
        form.plan(Checkpoint(known, {name: p.detach() for name, p in model.named_parameters()}, vocabulary), kind)


def read_rules(path: str | None) -> tuple[Any, ...]:
    """Rules from a JSON file.

    Raises:
        RuleError: no such file, or not a list of rules.
    """
    if path is None:
        return ()
    try:
        rules = from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RuleError(f"{path} cannot be read as rules: {error}") from None
    if not isinstance(rules, tuple):
        raise RuleError(f"{path} holds no list of rules; write [{{\"is\": \"model.rules:Rule\", \"where\": \"*.q_proj\", ...}}]")
    return rules


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
    record.coverage, record.bits = cover.table(), cover.bits
    record.rules = [rule.to_json() for rule in getattr(model, "qatlas_rules", ())]
    record.history = [dataclasses.asdict(history) for history in control.histories]
    after = weight_errors(model)
    record.errors = {name: (record.errors.get(name, (error, error))[0], error) for name, error in after.items()}


@contextmanager
def _timed(record: Record, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    record.times[stage] = record.times.get(stage, 0.0) + time.perf_counter() - began
