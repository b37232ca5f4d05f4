"""PEGE against the plain straight-through gradient under the same LSQ numbers: handwritten digits, a small perceptron, 2 bits for weights and inputs.

784-64-64-64-10 (ReLU) is trained in full precision on the first 4,000 images of MNIST, then fine-tuned as long with the two middle layers at 2 bits
(learned steps, inputs by tensor); first and last layer stay full. All rows of a seed start from the same weights and see the same images in the
same order. Judged on MNIST's 10,000 test images.

    plain               LSQ: ramp=0, pull=0
    PEGE                the paper's function with its defaults
    no pull             pull=0: the curriculum alone
    no curriculum       ramp=0: the pull alone
    linear              a base near 1: the share rises along a line
    fresh               weights drawn anew in each step
    error               the root mean square of W - Q(W) in steps, a mean over layers
    flips               weights whose code changed from one step to the next, per thousand, a mean over the last tenth of the steps

    python runs/pege.py [--out docs/evidence/pege] [--seeds 5] [--page FILE]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import kept
from pages import between
from quest import Train
from told import told
from torch import nn

from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule
from qatlas.papers.pege import pege
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.labelled import Images
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.tactic import Loop, Tactic

STEPS, BATCH, LR, IMAGES = 400, 64, 1e-3, 4000


class Flips(Tactic):
    """Count the codes that change in the last tenth."""

    def __init__(self) -> None:
        self._before: list[torch.Tensor] = []
        self._share: list[float] = []

    def after(self, loop: Loop) -> None:
        if loop.progress > 0.9:
            codes = [layer.quantize().codes for _, layer in loop.layers()]
            changed = [(a != b).float().mean().item() for a, b in zip(codes, self._before, strict=False)]
            self._share += [statistics.mean(changed)] if changed else []
            self._before = codes


def rows() -> dict[str, Train]:
    """Name -> how it is trained."""
    paper = partial(pege, bits=2, input_bits=2, static=True)
    return {"plain": partial(paper, ramp=0.0, pull=0.0), "PEGE": paper, "PEGE, no pull": partial(paper, pull=0.0),
            "PEGE, no curriculum": partial(paper, ramp=0.0), "PEGE, linear": partial(paper, base=1.001), "PEGE, fresh": partial(paper, order="fresh")}


def digits(out: Path) -> Path:
    """The first images, in a file of their own."""
    path = out / "digits.npz"
    if not path.exists():
        found = np.load(Path(os.environ["QATLAS_DATA"]) / "mnist/mnist.npz")
        np.savez(path, x_train=found["x_train"][:IMAGES], y_train=found["y_train"][:IMAGES], x_test=found["x_test"], y_test=found["y_test"])
    return path


def full(task: Images, seed: int) -> nn.Module:
    """The network in full precision."""
    torch.manual_seed(seed)
    sizes = (784, 64, 64, 64)
    layers = [part for came, went in pairwise(sizes) for part in (nn.Linear(came, went), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))
    fit(model, task, optimizer=AdamW(lr=LR), schedule=cosine(0.05), steps=STEPS)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/pege", type=Path)
    parser.add_argument("--scratch", default="out/pege", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", type=Path, help="the file whose section is made anew")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    path, found = str(digits(given.scratch)), {name: [] for name in ("full precision", *rows())}
    for seed in range(given.seeds):
        settings = {"seed": seed, "steps": STEPS, "batch": BATCH, "lr": LR, "images": IMAGES}
        start: list[nn.Module] = []

        def task(seed: int = seed) -> Images:
            return Images(path, batch=BATCH, run=Run(None, seed=seed, progress=False), extra_rules=(Rule("1", weight=None, input=None),))

        def before(seed: int = seed, start: list[nn.Module] = start) -> nn.Module:
            start[:] = start or [full(task(), seed)]
            return copy.deepcopy(start[0])

        def plain() -> dict[str, Any]:
            return {"accuracy": evaluate(before(), task())["accuracy"]}

        found["full precision"].append(kept(given.out / f"full-precision-s{seed}.json", settings, plain))
        for name, train in rows().items():
            def make(train: Train = train) -> dict[str, Any]:
                model, own, flips = before(), task(), Flips()
                own.run.tactics = (flips,)
                train(model, own, lr=LR, steps=STEPS)
                off = [((layer.weight - layer.hard()).square().mean().sqrt() / layer.weight_quantizer.scale.abs().mean()).item()
                       for layer in quantized(model).values()]
                return {"accuracy": evaluate(model, own)["accuracy"], "error": statistics.mean(off), "flips": 1000 * statistics.mean(flips._share)}

            found[name].append(kept(given.out / f"{name.replace(',', '').replace(' ', '-')}-s{seed}.json", settings, make))
    lines = ["| | accuracy, % | error, steps | flips, per thousand |", "|---|---|---|---|"]
    for name, runs in found.items():
        more = [told([run[key] for run in runs], 3) if key in runs[0] else "" for key in ("error", "flips")]
        lines.append(f"| {name} | {told([100 * run['accuracy'] for run in runs])} | {more[0]} | {more[1]} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.page:
        given.page.write_text(between(given.page.read_text(), "pege", text))


if __name__ == "__main__":
    main()
