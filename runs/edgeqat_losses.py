"""EdgeQAT on stories260K: what each of its losses is worth, which sign the distribution loss wants, and tokens of two widths against one.

stories260K is a pretrained Llama of 260,032 parameters, trained here on text that it wrote itself (lsq_stories260k.py) and judged on five real
stories. Weights of 4 bits, one step a matrix; static activations, one step a tensor, queries and keys included. All rows of a seed see the same
batches in the same order, the same number of steps, schedule (5 % warm-up, cosine) and learning rates (steps and zeros: a hundredth of their own unit
a step).

    A4   labels            plain LSQ: cross entropy alone
         distil            half of it the full-precision logits: the control of all that follows
         entropy           and the entropy loss                      distribution    and the distribution loss
         both              EdgeQAT's four terms                      published sign  the same with the authors' sign of the distribution loss
    A8, A6, A8/A4          with distil alone: 8, 6 bits, and 8 for one half of the tokens and 4 for the other

Besides the perplexity, on held-out text against the full-precision model: the mean cosine of the attention logits' maps, and how much of its
attention a token gives to the first one.

    python runs/edgeqat_losses.py [--out docs/evidence/edgeqat] [--seeds 3] [--page FILE]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from kept import kept
from lsq_stories260k import perplexity, setting
from pages import between
from told import means
from torch import nn

from qatlas.model.load import load
from qatlas.model.taps import read
from qatlas.papers.edgeqat import distribution_loss, edgeqat, products
from qatlas.train.evaluate import evaluate, judged
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling
from qatlas.train.teacher import Teacher

A4: dict[str, Any] = {"input_bits": 4, "low_bits": None}
PLAIN: dict[str, Any] = {"entropy": 0.0, "distribution": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "A4 labels": {**A4, **PLAIN, "distil": 0.0}, "A4 distil": {**A4, **PLAIN}, "A4 entropy": {**A4, "distribution": 0.0},
    "A4 distribution": {**A4, "entropy": 0.0}, "A4 both": A4, "A4 published sign": {**A4, "form": "published"},
    "A8": {**PLAIN, "low_bits": None}, "A6": {**PLAIN, "input_bits": 6, "low_bits": None}, "A8|A4": PLAIN}
STEPS, BATCH, LENGTH, GIVEN = 80, 8, 128, {"bits": 4, "lr": 1e-3, "scale_lr": 0.01}


def one(row: str, seed: int, place: tuple[Any, ...], out: Path) -> dict[str, Any]:
    """One run."""
    def make() -> dict[str, Any]:
        folder, tokenizer, text, real = place
        model = load(str(folder))[0]
        task, guide = LanguageModelling(text, tokenizer, length=LENGTH, batch=BATCH, run=Run(None, seed=seed, progress=False)), Teacher.of(model)
        torch.manual_seed(seed)
        model = edgeqat(model, task, steps=STEPS, **GIVEN, **ROWS[row])
        found = {"perplexity": perplexity(model, tokenizer, real), "held out": evaluate(model, task)["loss"]} | looked(model, guide.model, task)
        return found | {"history": task.run.histories[0].loss}

    return kept(out / f"stories-{row.replace(' ', '-').replace('|', '-')}-s{seed}.json",
                {"row": row, "seed": seed, "steps": STEPS, "batch": BATCH, "length": LENGTH, **GIVEN}, make)


@torch.no_grad()
def looked(model: nn.Module, full: nn.Module, task: LanguageModelling) -> dict[str, float]:
    """Of the attention on a held-out batch: the mean cosine with the full-precision model's, and the part that the first token gets."""
    batch = {"input_ids": next(iter(task.held_out()))["input_ids"]}
    found = []
    for each in (model, full):
        with judged(each), read(each, "@attention:probabilities") as maps, read(each, ["@attention:query", "@attention:key"]) as parts:
            each(**batch)
        names = [name.partition(":")[0] for name in maps]
        found.append(([products(parts[f"{name}:query"], parts[f"{name}:key"]) for name in names], [maps[f"{name}:probabilities"] for name in names]))
    (logits, maps), (theirs, other) = found
    first = [torch.stack([one[:, :, 8:, 0].mean() for one in each]).mean().item() for each in (maps, other)]
    return {"cosine": 1 - float(distribution_loss(logits, theirs, "linear")), "first": first[0], "first of full precision": first[1]}


def section(full: float, results: dict[str, list[dict[str, Any]]]) -> str:
    """The table."""
    lines = [f"| {STEPS} steps, {max(map(len, results.values()))} seeds | perplexity | cosine of maps | attention to the first token |",
             "|---|---|---|---|"]
    wanted = next((run["first of full precision"] for runs in results.values() for run in runs), 0.0)
    lines.append(f"| full precision | {full:.3f} | 1 | {wanted:.3f} |")
    lines += [f"| {row.replace('|', '/')} | " + " | ".join(means(runs, "perplexity", "cosine", "first", digits=3)) + " |"
              for row, runs in results.items() if runs]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/edgeqat")
    parser.add_argument("--scratch", default="out/stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    folder, model, tokenizer, text, real = setting(Path(os.environ["QATLAS_DATA"]), Path(given.scratch), 1024)
    place, results = (folder, tokenizer, text, real), {row: [] for row in ROWS}
    for seed in range(given.seeds):
        for row in ROWS:
            results[row].append(one(row, seed, place, Path(given.out)))
    made = section(perplexity(model, tokenizer, real), results)
    print(made)
    if given.page:
        page = Path(given.page)
        before = page.read_text()
        if "<!-- edgeqat -->" not in before:
            before += "\n## EdgeQAT\n\n<!-- edgeqat -->\n<!-- /edgeqat -->\n"
        page.write_text(between(before, "edgeqat", made))


if __name__ == "__main__":
    main()
