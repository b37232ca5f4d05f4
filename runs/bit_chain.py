"""BiT at one bit everywhere: what two sets, learned thresholds and a chain of teachers are worth, on a real encoder and a real decoder.

    sst2      MiniLM-L6 fine-tuned in full precision (runs/minilm_glue.py prepare --task sst2 --out DIR, given as --teacher DIR), sentences of 32
              tokens, word embeddings binarized too; accuracy on GLUE's dev part
    stories   stories260K, a pretrained Llama of 260,032 parameters, on text that it wrote itself (lsq_stories260k.py); perplexity of five real
              stories. Its feed-forward part is gated, so {0, 1} is of the attention probabilities alone; one set is not for decoders

All rows start from the same teacher and have the same losses, number of steps, batches in the same order, and learning rates:

    plain           {-alpha, alpha} everywhere, alpha = mean|x| from calibration, nothing learned but weights
    one set         {-alpha, alpha} everywhere, alpha and thresholds learned
    two sets        {0, alpha} for what is never negative, nothing learned but weights
    direct          two sets, elastic: the paper's BiT*
    chain           the same, half of the steps at 2 bits first, whose result then teaches: the paper's BiT

Measured besides the score: the loss of imitation (cross entropy with the teacher's answers, squared error of all hidden states) on held-out rows
against the full-precision teacher, whoever taught in the end.

    python runs/bit_chain.py --model sst2 --teacher DIR | --model stories [--out docs/evidence/bit] [--seeds 3] [--page FILE]
"""

from __future__ import annotations

import argparse
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from kept import kept
from pages import between
from told import told
from torch import nn

from qatlas.model.load import load
from qatlas.papers.bit import bit
from qatlas.train.evaluate import evaluate, judged
from qatlas.train.imitate import Imitation
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling
from qatlas.train.teacher import Teacher

ROWS: dict[str, dict[str, Any]] = {
    "plain": {"chain": (1,), "two_sets": False, "elastic": False}, "one set": {"chain": (1,), "two_sets": False},
    "two sets": {"chain": (1,), "elastic": False}, "direct": {"chain": (1,)}, "chain": {"chain": (2, 1)}}
# score, whether more is better, steps, batch, tokens, and what the paper's function is given besides
SETTINGS: dict[str, dict[str, Any]] = {
    "sst2": {"score": "accuracy", "steps": 60, "batch": 16, "length": 32, "given": {"lr": 5e-4, "scale_lr": 0.01, "relative": True}},
    "stories": {"score": "perplexity", "steps": 100, "batch": 8, "length": 128,
                "given": {"lr": 3e-3, "scale_lr": 0.01, "relative": True, "adamw": True}},
}


def prepared(name: str, given: argparse.Namespace, run: Run) -> tuple[nn.Module, Any, str]:
    """The full-precision model, its task, and the text that judges it besides (decoders)."""
    said = SETTINGS[name]
    if name == "sst2":
        from minilm_glue import glue

        model, tokenizer = load(given.teacher, "classification")
        return model, glue(name, tokenizer, run, batch=said["batch"], length=said["length"]), ""
    from lsq_stories260k import setting

    _, model, tokenizer, text, real = setting(Path(os.environ["QATLAS_DATA"]), Path(given.scratch), 1024)
    return model, LanguageModelling(text, tokenizer, length=said["length"], batch=said["batch"], run=run), real


def one(name: str, row: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    said = SETTINGS[name]

    def make() -> dict[str, Any]:
        run = Run(None, seed=seed, progress=False)
        model, task, real = prepared(name, given, run)
        guide = Teacher.of(model)
        torch.manual_seed(seed)
        model = bit(model, task, steps=said["steps"], **said["given"], **ROWS[row])
        return judge(model, task, guide, real) | {"history": [loss for history in run.histories for loss in history.loss]}

    return kept(Path(given.out) / f"{name}-{row.replace(' ', '-')}-s{seed}.json",
                {"model": name, "row": row, "seed": seed, **{key: said[key] for key in ("steps", "batch", "length", "given")}}, make)


def judge(model: nn.Module, task: Any, guide: Teacher, real: str) -> dict[str, float]:
    """The scores, and the loss of imitation on some held-out rows, against the full-precision teacher."""
    objective, total, rows = Imitation(task, guide, model, logits=1.0, hidden=1.0), 0.0, 0
    with judged(model):
        for batch in islice(task.held_out(), 8):
            total, rows = total + float(objective(model, batch)) * len(batch["labels"]), rows + len(batch["labels"])
    scores = {key: value for key, value in evaluate(model, task).items() if key in ("accuracy", "matthews", "loss")}
    if real:
        from lsq_stories260k import perplexity

        scores["perplexity"] = perplexity(model, task.tokenizer, real)
    return scores | {"imitation": total / rows}


def section(name: str, full: dict[str, float], results: dict[str, list[dict[str, Any]]]) -> str:
    """The table."""
    said = SETTINGS[name]
    lines = [f"| {said['steps']} steps, {max(map(len, results.values()))} seeds | {said['score']} | imitation |", "|---|---|---|",
             f"| full precision | {full[said['score']]:.3f} | |"]
    lines += [f"| {row} | {told([run[said['score']] for run in runs], 3)} | {told([run['imitation'] for run in runs], 3)} |"
              for row, runs in results.items() if runs]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--teacher", default="out/minilm/sst2", help="the directory that runs/minilm_glue.py has made")
    parser.add_argument("--out", default="docs/evidence/bit")
    parser.add_argument("--scratch", default="out/stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    given.rows = given.rows or [row for row, said in ROWS.items() if given.model == "sst2" or said.get("two_sets", True)]
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in given.rows}
    for seed in range(given.seeds):
        for row in given.rows:
            results[row].append(one(given.model, row, seed, given))
    model, task, real = prepared(given.model, given, Run(None, progress=False))
    text = section(given.model, judge(model, task, Teacher.of(model), real), results)
    print(text)
    if given.page:
        page = Path(given.page)
        mark, before = f"bit-{given.model}", page.read_text()
        if f"<!-- {mark} -->" not in before:
            before += f"\n## BiT, {given.model}\n\n<!-- {mark} -->\n<!-- /{mark} -->\n"
        page.write_text(between(before, mark, text))


if __name__ == "__main__":
    main()
