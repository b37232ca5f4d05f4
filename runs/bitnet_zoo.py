"""BitNet from scratch on the zoo's text: what three values cost, what two cost, and what the parts of the recipe are worth.

Every row is the zoo's architecture (a Llama of 3.4 million parameters, tied head) with its weights drawn anew from the run's seed; the same text in
the same order for the same seed, the same number of steps, the zoo's tokenizer. Judged by the perplexity of the held-out text, in full precision or
with the quantizers whole. Quantized models want higher learning rates, so each row has its own: tried at seed 0, on the text that also judges (a
choice among two, the same freedom for every row), and kept for the other seeds.

    full precision              the same optimizer, rates and decay, no quantizer
    full precision, SubLN       the control: what the norms are worth by themselves
    b1.58                       ternary weights, 8-bit inputs, two stages
    b1.58, SubLN                the same with norms in front of output and down projections
    b1.58, SubLN, one cosine    the same with one cosine and decay to the end, in place of two stages
    b1, SubLN                   the sign

The paper's claims at this size: full precision < b1.58 < b1 in perplexity; SubLN with the higher rate better than none; two stages no worse than one
cosine. The text is small: 800 steps of 1,024 tokens are about one epoch, and more than three measure memory, not language.

A control of the bench itself: with 8-bit weights in the place of ternary ones the losses must be those of full precision (--control STEPS).

    python runs/bitnet_zoo.py [--out out/bitnet_zoo] [--seeds 3] [--steps 400] [--lrs 5e-4 1.5e-3] [--page docs/results.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from kept import kept
from pages import between
from told import told

from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.layers.norm import Norm
from qatlas.model.fresh import renew
from qatlas.model.load import load
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.bitnet import bitnet, unnormed
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import two_stage
from qatlas.train.tactic import NoDecay
from qatlas.train.task import LanguageModelling

MODEL, DATA = "zoo:gpt", "builtin:docs"
ROWS: dict[str, dict[str, Any] | None] = {                        # a row -> what bitnet is told; None: full precision
    "full precision": None,
    "full precision, SubLN": None,
    "b1.58": {"bits": 1.58},
    "b1.58, SubLN": {"bits": 1.58, "sub_norm": True},
    "b1.58, SubLN, one cosine": {"bits": 1.58, "sub_norm": True, "two_stage": False},
    "b1, SubLN": {"bits": 1, "sub_norm": True},
}
EIGHT = "8-bit weights"                                           # the control's
WARMUP, DECAY = 0.05, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/bitnet_zoo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1.5e-3])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--page", help="the file whose section is made anew")
    parser.add_argument("--control", type=int, metavar="STEPS", help="train full precision and 8-bit weights for so many steps, and nothing else")
    given = parser.parse_args()
    out = Path(given.out)
    if given.control:
        return control(out, given)
    tried = {row: [one(out, row, lr, 0, given) for lr in given.lrs] for row in ROWS}
    best = {row: min(runs, key=lambda run: run["perplexity"]) for row, runs in tried.items()}
    chosen = {row: [best[row]] for row in ROWS}
    for seed in range(1, given.seeds):
        for row in ROWS:
            chosen[row].append(one(out, row, best[row]["lr"], seed, given))
    text = section(tried, chosen, given)
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "bitnet", text))


def control(out: Path, given: argparse.Namespace) -> None:
    """The losses of full precision and of 8-bit weights, same seed, same steps, at the highest rate; kept as control.json."""
    losses = {}
    for row in ("full precision", EIGHT):
        model, tokenizer = load(MODEL)
        task = LanguageModelling(DATA, tokenizer, length=given.length, batch=given.batch, run=Run(None, seed=0))
        train(model, task, row, max(given.lrs), given.control)
        losses[row] = task.run.histories[0].loss
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    (out / "control.json").write_text(json.dumps(losses | {"largest difference": apart, "lr": max(given.lrs), "batch": given.batch}))
    print(f"the losses of {given.control} steps differ by at most {apart:.4f}; the last: " + ", ".join(f"{each[-1]:.3f}" for each in losses.values()))


def one(out: Path, row: str, lr: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One trained run."""
    def make() -> dict[str, Any]:
        model, tokenizer = load(MODEL)
        task = LanguageModelling(DATA, tokenizer, length=given.length, batch=given.batch, run=Run(None, seed=seed))
        train(model, task, row, lr, given.steps)
        return evaluate(model, task) | {"losses": task.run.histories[0].loss[::10]}

    return kept(out / f"{row.replace(',', '').replace(' ', '-')}-lr{lr:g}-s{seed}.json",
                {"row": row, "lr": lr, "seed": seed, "steps": given.steps, "batch": given.batch, "length": given.length}, make)


def section(tried: dict[str, list[dict[str, Any]]], chosen: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> str:
    """The table: each row at its best rate, its two rates at seed 0, and seed by seed against its control."""
    against = {"full precision, SubLN": "full precision", "b1.58": "full precision", "b1.58, SubLN": "b1.58",
               "b1.58, SubLN, one cosine": "b1.58, SubLN", "b1, SubLN": "b1.58, SubLN"}
    lines = ["| | perplexity | learning rate | " + " | ".join(f"seed 0 at {lr:g}" for lr in given.lrs) + " | against | lower in |",
             "|---" * (len(given.lrs) + 5) + "|"]
    for row, runs in chosen.items():
        other, below = against.get(row, ""), ""
        if other:
            below = f"{sum(a['perplexity'] < b['perplexity'] for a, b in zip(runs, chosen[other], strict=True))} of {len(runs)} seeds"
        lines.append(f"| {row} | {told([run['perplexity'] for run in runs])} | {runs[0]['lr']:g} | "
                     + " | ".join(f"{run['perplexity']:.2f}" for run in tried[row]) + f" | {other} | {below} |")
    return "\n".join(lines) + "\n"


def train(model: torch.nn.Module, task: LanguageModelling, row: str, lr: float, steps: int) -> None:
    """A row's training, in place."""
    told = ROWS.get(row)
    if told is not None:
        bitnet(model, task, scratch=True, lr=lr, weight_decay=DECAY, warmup=WARMUP, steps=steps, **told)
        return
    renew(model, task.run.seed)
    if row == EIGHT:
        quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=Quant(Uniform(8)))])
    if "SubLN" in row:
        quantize(model, [Rule(name, norm=Norm()) for name in unnormed(model)])
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=DECAY, betas=(0.9, 0.95)), schedule=two_stage(WARMUP), steps=steps, tactics=[NoDecay(0.5)])


if __name__ == "__main__":
    main()
