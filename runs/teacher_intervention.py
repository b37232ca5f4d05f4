"""Teacher Intervention against plain distillation, on a real encoder, a real image model and a real decoder.

    cola rte sst2   MiniLM-L6 fine-tuned in full precision (runs/minilm_glue.py), ternary weights, 8-bit activations
    vit  vit_token  the CIFAR-10 ViT (runs/cifar_vit.py), one scale a tensor; and a token
    stories         stories260k, a Llama (runs/stories260k.py), on text that it wrote itself

All rows of a table start from the same teacher and have the same numbers, losses, steps and batches in the same order. The second part draws dropout
anew, so that plain and the others drop differently:

    plain       TernaryBERT with Teacher Intervention's four losses: one schedule over all steps
    restart     the boring control: the same, the learning rate (and Adam) starting anew after the first part
    TI-O TI-M TI-G   intervention at the output, at the map, gradual, in the first part

Measured on held-out data: the task's score; the loss of imitation, and its curve over the steps, from which follow the steps and seconds that a run
needs to reach plain's last value; block-output MSE against the teacher by depth; the largest eigenvalue of the Hessian of the loss.

    python runs/teacher_intervention.py --task cola --teacher DIR --seed 0 --out DIR [--rows plain TI-G ...]      writes DIR/cola-0-plain.json ...
    python runs/teacher_intervention_table.py --out DIR                                                            the tables and figures
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatlas.papers.teacher_intervention import teacher_intervention
from qatlas.train.apart import depth_errors
from qatlas.train.evaluate import evaluate, judged
from qatlas.train.imitate import Imitation
from qatlas.train.run import Run
from qatlas.train.sharpness import sharpness
from qatlas.train.tactic import Loop, Tactic
from qatlas.train.task import LanguageModelling, device, moved
from qatlas.train.teacher import Teacher

ROWS: dict[str, dict[str, Any]] = {"plain": {"first": 0}, "restart": {"mode": "none"}, "TI-O": {"mode": "output"}, "TI-M": {"mode": "map"},
                                   "TI-G": {"mode": "gradual"}}
# steps, first part, learning rate (chosen by the loss of `plain` after all steps), and what the paper's function is given besides.
SETTINGS: dict[str, dict[str, Any]] = {
    "cola": {"steps": 200, "first": 30, "lr": 2e-4, "batch": 16, "metric": "matthews"},
    "sst2": {"steps": 80, "first": 16, "lr": 2e-4, "batch": 16, "metric": "accuracy"},
    "rte": {"steps": 30, "first": 6, "lr": 2e-4, "batch": 16, "metric": "accuracy"},
    "vit": {"steps": 120, "first": 24, "lr": 2e-4, "batch": 32, "metric": "accuracy"},
    "vit_token": {"steps": 60, "first": 12, "lr": 2e-4, "batch": 32, "metric": "accuracy", "per_token": True},
    "stories": {"steps": 120, "first": 18, "lr": 1e-3, "batch": 8, "metric": "real perplexity", "clip": None},
}
TERMS = {"logits": 1.0, "hidden": 1.0, "scores": 1.0, "attended": 1.0}
SHARP = ("cola", "vit", "stories")                                # where the Hessian is looked at, for the first seed: it is the dearest measure
HELD = 128                                                        # rows of the curve


def prepared(name: str, teacher: str, run: Run) -> tuple[nn.Module, Any, Any]:
    """The full-precision model, its task, and the same task with few held-out rows for the curve."""
    batch = SETTINGS[name]["batch"]
    if name in ("cola", "rte", "sst2"):
        from minilm_glue import glue

        from qatlas.model.load import load

        model, tokenizer = load(teacher, "classification")
        length = 64                                               # also of RTE, for two cores; its teacher was trained with 128
        return model, glue(name, tokenizer, run, batch=batch, length=length), glue(name, tokenizer, run, rows=64, held=HELD, batch=64, length=length)
    if name.startswith("vit"):
        from cifar_vit import cifar_task, cifar_vit

        task, few = cifar_task(batch, run), cifar_task(128, run)
        for each, rows in ((task, 2000), (few, 2 * HELD)):        # the first so many test images
            each.images[1], each.labels[1], each.held_rows = each.images[1][:rows], each.labels[1][:rows], rows
        return cifar_vit(), task, few
    from lsq_stories260k import setting

    _, model, tokenizer, text, real = setting(Path(os.environ["QATLAS_DATA"]), Path(teacher), 1024)
    task = Stories(text, tokenizer, length=256, batch=batch, run=run)
    task.real = real
    return model, task, task


class Stories(LanguageModelling):
    """The text that the model wrote; judged on five real stories, too."""

    real = ""

    def score(self, model: nn.Module) -> dict[str, float]:
        from lsq_stories260k import perplexity

        return super().score(model) | {"real perplexity": perplexity(model, self.tokenizer, self.real)}


class Curve(Tactic):
    """The loss of imitation on held-out rows, and seconds of training, every so many steps of the whole run."""

    def __init__(self, objective: Imitation, batches: list[Any], every: int) -> None:
        self._objective, self._batches, self._every = objective, batches, every
        self._done, self._seconds, self.points = 0, 0.0, []

    def before(self, loop: Loop) -> None:
        self._began = time.process_time()

    def after(self, loop: Loop) -> None:
        self._seconds += time.process_time() - self._began
        self._done += 1
        if self._done % self._every == 0:
            self.points.append((self._done, self._seconds, judge(loop.model, self._objective, self._batches)))


def judge(model: nn.Module, objective: Imitation, batches: list[Any]) -> float:
    """The mean loss of imitation over batches, in eval mode."""
    with judged(model):
        total = sum(float(objective(model, moved(batch, device(model)))) * len(batch["labels"]) for batch in batches)
    return total / sum(len(batch["labels"]) for batch in batches)


def one(name: str, row: str, seed: int, teacher: str, steps: int | None = None, lr: float | None = None, measures: bool = True) -> dict[str, Any]:
    """One run, as a dict of what was measured."""
    run = Run(None, seed=seed, progress=False)
    model, task, few = prepared(name, teacher, run)
    given = dict(SETTINGS[name])
    metric, batch = given.pop("metric"), given.pop("batch")
    share, steps = given["first"] / given["steps"], steps or given["steps"]
    given |= {"lr": lr or given["lr"], "steps": steps, "first": round(share * steps), **ROWS[row]}
    guide = Teacher.of(model)
    objective = Imitation(few, guide, model, **TERMS)
    batches = list(islice(few.held_out(), 4))
    curve = Curve(objective, batches, max(1, given["steps"] // 6))
    run.tactics = (curve,)
    torch.manual_seed(seed)
    began = time.process_time()
    model = teacher_intervention(model, task, **given)
    seconds = time.process_time() - began
    found = {"task": name, "row": row, "seed": seed, "batch": batch, **given, "metric": metric, "scores": evaluate(model, task),
             "teacher": evaluate(guide.model, task) if row == "plain" else None, "loss": judge(model, objective, batches), "curve": curve.points,
             "history": [value for history in run.histories for value in history.loss], "seconds": seconds, "threads": torch.get_num_threads()}
    if measures:
        found["depth"] = depth_errors(model, guide.model, few, 2)
    if measures and seed == 0 and name in SHARP:
        few_batches = [{key: value[:16] for key, value in batches[0].items()}]
        found["sharpness"] = sharpness(model, objective, few_batches, tolerance=1e-2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=["run"], default="run")
    parser.add_argument("--task", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--teacher", default="")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--bare", action="store_true", help="without errors by depth and sharpness")
    given = parser.parse_args()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    for row in given.rows:
        file = out / f"{given.task}-{given.seed}-{row}.json"
        if not file.exists():
            found = one(given.task, row, given.seed, given.teacher, given.steps, given.lr, not given.bare)
            aside = file.with_suffix(f".part-{os.getpid()}")
            aside.write_text(json.dumps(found))
            aside.rename(file)
            print(file.name, {key: round(value, 4) for key, value in found["scores"].items()}, f"loss {found['loss']:.4f}, {found['seconds']:.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
