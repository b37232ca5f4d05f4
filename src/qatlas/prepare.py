"""From a job to what is trained: the model, its tokenizer and the task, with everything refused early that cannot end well."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .core.error import CheckpointError, DataError, RuleError, unknown
from .core.noun import from_json
from .export import Checkpoint
from .export import target as find_target
from .model.fold import fold
from .model.load import load, speciality, start
from .model.probe import undisturbed
from .train import data
from .train.chat import Chat
from .train.labelled import Classification, Images
from .train.run import Run
from .train.task import LanguageModelling, Task

TASKS = {"lm": LanguageModelling, "chat": Chat, "classification": Classification, "image": Images}


@dataclass
class Job:
    """What all papers share.

    Args:
        model: a hub id, a directory, a GGUF file, or zoo:gpt, zoo:vit, zoo:resnet. What others have quantized starts dequantized.
        data: a hub id, a file (.txt .md .jsonl .json .csv .parquet .npz), or builtin:docs.
        task: lm, chat, classification or image; auto looks at the model.
        out: the directory of all that the run leaves behind.
        target: the artefact to train for and to write, such as gguf:tq2_0 (`qatlas doctor` lists them); none trains for the packed directory only.
        rules: a JSON file of extra rules, which stand before the paper's.
        fold: fold the batch norms into the convolutions in front of them first (ResNet); for a model that goes to an engine.
        seed: of the data order and all else that is drawn.
        resume: go on from the resume points in out.
        length: tokens of a window (lm, chat) or of a sentence.
        batch: rows of an optimizer step.
        micro: rows of one forward; smaller needs less memory; activations with one fresh scale a tensor then have one a part.
        precision: no (fp32) or bf16, where the chip has it.
        compile: quant compiles the fake quantization (some seconds at the start, less time a step, the same codes); no leaves it as it is.
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
    fold: bool = False
    seed: int = 0
    resume: bool = False
    length: int = 256
    batch: int = 8
    micro: int | None = None
    precision: str = "no"
    compile: str = "no"
    watch: int = 0
    save_every: int | None = None
    threads: int = 0
    tensorboard: bool = False
    plan: bool = False


def prepare(job: Job, control: Run, say: Callable[[str], None] = lambda line: None, train: bool = False) -> tuple[nn.Module, Any, Task]:
    """The model, its tokenizer and the task of a job. `say` is told what was chosen on the way. train: what others have quantized comes in full
    precision (`load.start`), not packed.

    Raises:
        DataError: a task that does not exist, or that the model has no tokenizer for. CheckpointError: a model that cannot be loaded, or holds NaN.
        FormatError: a target that does not know such a model or such a tokenizer.
    """
    if job.task not in (*TASKS, "auto"):
        raise DataError(unknown("task", job.task, [*TASKS, "auto"]))
    rules = read_rules(job.rules)
    data.present(job.data)
    kind = speciality(job.model) if job.task == "auto" else job.task
    model, tokenizer = (start if train else load)(job.model, "lm" if kind == "chat" else kind)
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise CheckpointError(f"{job.model} holds NaN or infinity in {len(broken)} tensors, for instance {broken[0]}; nothing can be trained from it")
    if job.fold:
        fold(model)
    if job.target:
        _check_target(job.target, model, tokenizer)
    if kind == "image":
        images = Images(job.data, batch=job.batch, target=job.target, extra_rules=rules, run=control)
        _check_labels(job, model, images)
        _check_images(job, model, images)
        return model, tokenizer, images
    if tokenizer is None:
        raise DataError(f"{job.model} has no tokenizer, which the task {kind!r} needs; put tokenizer.json beside its weights")
    more = {"names": _names(model)} if kind == "classification" else {}
    task = TASKS[kind](job.data, tokenizer, length=job.length, batch=job.batch, target=job.target, extra_rules=rules, run=control, **more)
    _check_labels(job, model, task)
    if names := getattr(task, "names", ()):
        _name(model, names)
        say(f"labels: {', '.join(f'{i} is {name}' for i, name in enumerate(names))}")
    return model, tokenizer, task


def _names(model: nn.Module) -> list[str]:
    """The names of the model's classes, in their order; LABEL_0 and so on where nobody named them."""
    known = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [known[i] for i in sorted(known)]


def _name(model: nn.Module, names: Sequence[str]) -> None:
    """Keep the names of the classes in the model's config; a head with more classes keeps its own for the rest."""
    if (config := getattr(model, "config", None)) is not None:
        config.id2label = dict(enumerate([*names, *_names(model)[len(names) :]]))
        config.label2id = {name: i for i, name in config.id2label.items()}


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
        known = config.to_dict() | {"architectures": [type(model).__name__]} if config is not None else {}
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
