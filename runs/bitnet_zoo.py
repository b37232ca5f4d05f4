"""BitNet from scratch on the zoo's text: what three values cost, what two cost, and what the parts of the recipe are worth.

Every row is the zoo's architecture (a Llama of 3.4 million parameters, tied head) with its weights drawn anew from the run's seed; the same text in
the same order for the same seed, the same number of steps, the zoo's tokenizer. Judged by the perplexity of the held-out text, in full precision or
with the quantizers whole. Each row at each learning rate, since quantized models want higher ones: what is compared is each row at its best.

    full precision              the same optimizer, rates and decay, no quantizer
    full precision, SubLN       the control: what the norms are worth by themselves
    b1.58                       ternary weights, 8-bit inputs, two stages
    b1.58, SubLN                the same with norms in front of output and down projections
    b1.58, SubLN, one cosine    the same with one cosine and decay to the end, in place of two stages
    b1, SubLN                   the sign

The paper's claims at this size: full precision < b1.58 < b1 in perplexity; SubLN with the higher rate better than none; two stages no worse than one
cosine. The text is small: 400 steps are about one epoch, and more than three measure memory, not language.

    python runs/bitnet_zoo.py [--out out/bitnet_zoo] [--seeds 3] [--steps 400] [--lrs 1.5e-3 4.5e-3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from qatlas.layers.norm import Norm
from qatlas.model.load import load
from qatlas.model.rules import Rule, quantize
from qatlas.papers.bitnet import bitnet, renew, unnormed
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
WARMUP, DECAY = 0.05, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/bitnet_zoo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1.5e-3, 4.5e-3])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    out = Path(given.out)
    results: dict[str, dict[str, list[float]]] = {}
    for row in ROWS:
        for lr in given.lrs:
            kept = [one(out, row, lr, seed, given) for seed in range(given.seeds)]
            results.setdefault(row, {})[f"{lr:g}"] = [run["perplexity"] for run in kept]
    (out / "results.json").write_text(json.dumps({"perplexity": results, "arguments": vars(given)}, indent=1))
    print("| | " + " | ".join(f"lr {lr:g}" for lr in given.lrs) + " |\n|---|" + "---|" * len(given.lrs))
    for row, each in results.items():
        print(f"| {row} | " + " | ".join(told(values) for values in each.values()) + " |")


def told(values: list[float]) -> str:
    """Mean and spread."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def one(out: Path, row: str, lr: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One trained run, kept in its own directory; a run that is there already is not repeated, one that was broken off goes on."""
    where = out / f"{row.replace(',', '').replace(' ', '-')}-lr{lr:g}-s{seed}"
    if (where / "kept.json").exists():
        return json.loads((where / "kept.json").read_text())
    began = time.perf_counter()
    model, tokenizer = load(MODEL)
    task = LanguageModelling(DATA, tokenizer, length=given.length, batch=given.batch, run=Run(where, seed=seed, resume=where.exists()))
    train(model, task, row, lr, given.steps)
    kept = evaluate(model, task) | {"losses": task.run.histories[0].loss, "seconds": time.perf_counter() - began}
    where.mkdir(parents=True, exist_ok=True)
    (where / "kept.json").write_text(json.dumps(kept))
    task.run.finish()
    print(where.name, f"{kept['perplexity']:.3f}", f"{kept['seconds']:.0f} s", flush=True)
    return kept


def train(model: torch.nn.Module, task: LanguageModelling, row: str, lr: float, steps: int) -> None:
    """A row's training, in place."""
    told = ROWS[row]
    if told is not None:
        bitnet(model, task, scratch=True, lr=lr, weight_decay=DECAY, warmup=WARMUP, steps=steps, **told)
        return
    renew(model, task.run.seed)
    if "SubLN" in row:
        quantize(model, [Rule(name, norm=Norm()) for name in unnormed(model)])
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=DECAY, betas=(0.9, 0.95)), schedule=two_stage(WARMUP), steps=steps, tactics=[NoDecay(0.5)])


if __name__ == "__main__":
    main()
