"""Benchmarks of the field on a model of ours: lm-eval (EleutherAI's harness) asks, the packed model itself answers.

    benchmark(model, tokenizer, ["lambada_openai"])                          tasks of lm-eval's own list, their data from the Hub
    benchmark(model, tokenizer, ["animals"], task_path="mytasks")            tasks that are YAML files in a folder, their data beside them

lm-eval wraps the transformers model that it is given, so what is measured is the codes and scales as they are, not a copy in full precision. A task's
YAML names its data as lm-eval wants it (`dataset_path: json`, `dataset_kwargs: data_files: test: animals.jsonl`); names of files are those of the
folder in which the YAML lies. `keep` writes the scores into eval.json beside record.json, task by task: a later run of another task adds to it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from ..core.error import SAID, CheckpointError, DataError, RunError, unknown

FILE = "eval.json"


def lacks() -> str | None:
    """The sentence for the missing package, or None."""
    return None if find_spec("lm_eval") else "benchmarks need lm-eval, which is not installed: pip install 'qatlas[eval]'"


def benchmark(model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, task_path: str | Path | None = None, limit: int | None = None,
              shots: int | None = None, batch: int = 8) -> dict[str, dict[str, float]]:
    """Task -> metric -> value; the standard error of a metric is called "<metric> ±".

    task_path: a folder with tasks as YAML. limit: documents of each task, for a quick look. shots: examples before each question; None leaves it to
    the task. batch: rows of a forward.

    Raises:
        RunError: lm-eval is missing. DataError: a task that does not exist or cannot be read, a model that is no language model.
    """
    if lacks():
        raise RunError(str(lacks()))
    if tokenizer is None or not getattr(model, "can_generate", lambda: False)():
        raise DataError(f"benchmarks ask language models with a tokenizer, this is a {type(model).__name__}{'' if tokenizer else ' without one'}")
    if task_path is not None and not Path(task_path).is_dir():
        raise DataError(f"--task_path {task_path}: there is no such folder; give one that holds tasks as YAML files")
    with _quiet(task_path):
        found = _ask(model, tokenizer, list(tasks), task_path, limit, shots, batch)
    return {task: _plain(scores) for task, scores in found.items()}


def _ask(model: nn.Module, tokenizer: Any, tasks: list[str], task_path: Any, limit: int | None, shots: int | None, batch: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=None if task_path is None else ".", include_defaults=task_path is None)     # _quiet stands in the folder
    missing = [task for task in tasks if not known.match_tasks([task])]
    if missing:
        where = f" in {task_path}" if task_path is not None else "; tasks of your own: --task_path FOLDER"
        raise DataError(unknown("task", missing[0], known.all_tasks if len(known.all_tasks) < 50 else []) + where)
    try:
        asks = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")
        found = simple_evaluate(asks, tasks=tasks, task_manager=known, limit=limit, num_fewshot=shots, bootstrap_iters=0, log_samples=False)
    except Exception as error:                                    # a task is a program of its own: whatever it raises is about the task
        raise DataError(f"lm-eval cannot ask {', '.join(tasks)} ({type(error).__name__}: {' '.join(str(error).split())[:SAID]}). A task's data comes "
                        "from the Hub, or from files beside its YAML") from error
    return dict(found["results"])


def _plain(scores: dict[str, Any]) -> dict[str, float]:
    """Numbers alone, lm-eval's "acc,none" as "acc"."""
    out = {}
    for key, value in scores.items():
        name, _, of = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and of:
            out[(name.removesuffix("_stderr") + " ±" if name.endswith("_stderr") else name) + ("" if of == "none" else f" {of}")] = float(value)
    return out


def keep(folder: str | Path, scores: dict[str, dict[str, float]], **how: Any) -> Path:
    """Add scores to eval.json of a run's directory; written aside and renamed.

    Raises:
        CheckpointError: a file there that is not ours.
    """
    from importlib.metadata import version

    path = Path(folder) / FILE
    there = read(folder) if path.exists() else {}
    there |= {task: {"scores": mine, "lm-eval": version("lm-eval"), **how} for task, mine in scores.items()}
    aside = path.with_name(f"{FILE}.part")
    aside.write_text(json.dumps(there, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def read(folder: str | Path) -> dict[str, Any]:
    """Task -> {"scores", "lm-eval", ...} of a directory.

    Raises:
        CheckpointError: no such file, or not ours.
    """
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to begin anew") from None
    if not isinstance(found, dict) or not all(isinstance(each, dict) and "scores" in each for each in found.values()):
        raise CheckpointError(f"{path} holds no scores of ours; move it away")
    return found


@contextlib.contextmanager
def _quiet(task_path: Any) -> Iterator[None]:
    """In the folder of the tasks, so that their files are found; without lm-eval's lines and, where nobody looks, without its bars."""
    log, seen = logging.getLogger("lm_eval"), sys.stderr.isatty()
    before, errors = log.level, os.dup(2)
    log.setLevel(logging.ERROR)
    try:
        with contextlib.chdir(task_path or "."), contextlib.ExitStack() as quiet, open(os.devnull, "w") as nowhere:
            if not seen:
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
                os.dup2(nowhere.fileno(), 2)                      # it asks git for a version, which complains there
            yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        log.setLevel(before)
