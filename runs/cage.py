"""CAGE against the same without: a pretrained Llama of 260,032 parameters, weights and inputs of few bits.

stories260K; text and judgement as in lsq_stories260k.py: the model wrote the training text itself (its labels are the loss), the perplexity of five
real stories that nothing was trained on. All rows of a base see the same text in the same order for the same seed, and have the same steps and rate.

    base        QuEST (rotation, Gaussian steps, gradients cut at the last level), or LSQ (a learned step a channel, no rotation)
    lambda      0 is the base alone. Runs are short, so lambda is large; `left` is what the pulls leave of a weight's way to a fixed grid point
                (0.07 to 0.20 in the authors' runs)
    distance    the mean over layers of |x - Q(x)| / |x| at the end
    turning     of 1,000 weights, how many integers changed in each of the last steps (a fifth of the run: that in which CAGE acts)

    python runs/cage.py [--out docs/evidence/cage] [--seeds 3] [--steps 100] [--page FILE]
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import kept
from pages import between
from paretoq_bits import Place
from told import means
from torch import nn

from qatlas.model.quantized import quantized
from qatlas.papers.cage import Cage, cage, left
from qatlas.train.schedule import cosine
from qatlas.train.tactic import Loop, Tactic

ROWS = {"QuEST, 3 bits": {"base": "quest", "bits": 3, "input_bits": 3}, "QuEST, 2 bits": {"base": "quest", "bits": 2, "input_bits": 2},
        "LSQ, 2 bits": {"base": "lsq", "bits": 2, "input_bits": 8, "hadamard": None}}
LAMBDAS = (0.0, 30.0, 300.0)


class Turning(Tactic):
    """How many integers of 1,000 change in a step of the last fifth."""

    def __init__(self) -> None:
        self._codes: dict[str, torch.Tensor] = {}
        self._share: list[float] = []

    def after(self, loop: Loop) -> None:
        if loop.progress < 0.8:
            return
        now = {name: layer.quantize().codes for name, layer in loop.layers()}
        if self._codes:
            changed = sum(int((now[name] != self._codes[name]).sum()) for name in now)
            self._share.append(1000 * changed / sum(codes.numel() for codes in now.values()))
        self._codes = now


def distance(model: nn.Module) -> float:
    """The mean over layers of |x - Q(x)| / |x|."""
    return statistics.mean(float((layer.weight - layer.hard()).detach().norm() / layer.weight.detach().norm()) for layer in quantized(model).values())


def one(place: Place, row: dict[str, Any], strength: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One trained run."""
    task, turning = place.task(seed, given.batch), Turning()
    task.run.tactics = (turning,)
    model = cage(place.model(), task, strength=strength, lr=given.lr, weight_decay=0.0, steps=given.steps, **row)
    share = left(Cage(strength), given.lr, cosine(0.1, end=0.1), given.steps)
    return place.judge(model, task) | {"distance": distance(model), "turning": statistics.mean(turning._share), "left": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/cage")
    parser.add_argument("--scratch", default="out/cage_stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    place, results = Place("stories", Path(given.scratch), 1024), {}
    for name, row in ROWS.items():
        for seed in range(given.seeds):
            for strength in LAMBDAS:
                settings = {"lr": given.lr, "seed": seed, "steps": given.steps, "batch": given.batch, "lambda": strength}
                where = Path(given.out) / f"{name.replace(', ', '-').replace(' ', '')}-lambda{strength:g}-s{seed}.json"
                results.setdefault((name, strength), []).append(kept(where, settings, partial(one, place, row, strength, seed, given)))
    text = section(results)
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "cage", text))


def section(results: dict[tuple[str, float], list[dict[str, Any]]]) -> str:
    """The table; the last column is the mean of the differences from the same seed without CAGE."""
    lines = ["| base | lambda | left | perplexity | held out | distance | turning | loss against lambda 0, seed by seed |", "|---" * 8 + "|"]
    for (name, strength), runs in results.items():
        apart = [run["held out"] - plain["held out"] for run, plain in zip(runs, results[name, 0.0], strict=True)]
        told = ", ".join(f"{one:+.4f}" for one in apart) if strength else ""
        cells = [*means(runs, "perplexity"), *means(runs, "held out", "distance", digits=4), *means(runs, "turning")]
        lines.append(f"| {name} | {strength:g} | {runs[0]['left']:.2f} | " + " | ".join(cells) + f" | {told} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
