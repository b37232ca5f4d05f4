"""Oscillations induced, damped and frozen: a pretrained ResNet-20 on CIFAR-10, weights of 3 bits, activations in full precision.

All trained rows start from the same checkpoint and see the same batches in the same order for the same seed; AdamW, cosine, one learning rate.

    rounded        the checkpoint, rounded                                          the rows below it: trained in full precision, then rounded
    full           trained by the task's loss alone (lambda 0), then rounded         the boring control of `induce`
    induce         the same with the regulariser; lambda chosen at seed 0 by 750 images that nothing was trained on
    STE            trained under the same rounding, one fresh step a matrix, straight-through
    LSQ            trained under a learned step a channel                           the control of the two below
    dampen, freeze the same with dampening, with freezing

    accuracy       of 1,500 test images, rounded to the bits that were trained for; `at b`: the same weights rounded to b bits (fresh steps only)
    edges          share of weights within a tenth of a step of an edge between two bins
    turning        share of weights whose integer turns back and forth in more than 0.5 % of the steps, frozen ones left out
    norms anew     accuracy after the batch norms were measured anew on 50 batches

    python runs/oscillations.py [--out docs/evidence/oscillations] [--seeds 3] [--steps 80] [--page FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cifar_rows import ENDS, Cifar
from kept import kept
from pages import between
from told import means
from torch import nn

from qatlas.model.places import at_edges
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.oscillations import of_weight, oscillations
from qatlas.papers.overcoming_oscillations import overcoming_oscillations
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.renorm import reestimate
from qatlas.train.schedule import cosine
from qatlas.train.task import Task
from qatlas.train.track import Track

CROSS = (2, 3, 4, 8)
LAMBDAS = (300.0, 1000.0, 3000.0)


def ste(model: nn.Module, task: Task, *, bits: int, steps: int, lr: float) -> nn.Module:
    """Trained under the rounding of `oscillations`, straight-through: no paper, its control."""
    quantize(model, [Rule("*", weight=of_weight(bits, detach=True))], task)      # the task keeps the ends full
    fit(model, task, optimizer=AdamW(lr=lr), schedule=cosine(0.05), steps=steps)
    return model


ROWS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "full": (oscillations, {"strength": 0.0}), "induce": (oscillations, {}), "STE": (ste, {}),
    "LSQ": (overcoming_oscillations, {"threshold": 0.0}), "dampen": (overcoming_oscillations, {"threshold": 0.0, "strength": 0.1}),
    "freeze": (overcoming_oscillations, {})}
AT = {3: tuple(ROWS)}
FRESH = ("full", "induce", "STE")


def rounded(cifar: Cifar, trained: nn.Module, bits: int) -> nn.Module:
    """The masters of a model under fresh steps of so many bits."""
    model = cifar.model()
    own = dict(trained.state_dict())
    model.load_state_dict({name: own[name] for name in model.state_dict()})
    return quantize(model, [*keep_full(*ENDS), Rule("*", weight=of_weight(bits))]).eval()


def one(cifar: Cifar, name: str, bits: int, seed: int, steps: int, lr: float, strength: float | None) -> dict[str, Any]:
    """One trained row."""
    watch = Track()
    paper, more = ROWS[name]
    more = more | ({} if strength is None else {"strength": strength})
    quiet = name in ("full", "induce")                            # their integers are of a rounding that the training does not see
    model = paper(cifar.model(), cifar.task(seed, () if quiet or name == "freeze" else (watch,)), bits=bits, steps=steps, lr=lr, **more)
    found: dict[str, Any] = {"accuracy": cifar.accuracy(model), "choice": cifar.chosen(model), "edges": 100 * at_edges(model)}
    if not quiet and name != "freeze":
        found["turning"] = 100 * watch.turning()
    if name in FRESH:
        found |= {f"at {b}": found["accuracy"] if b == bits else cifar.accuracy(rounded(cifar, model, b)) for b in CROSS}
    reestimate(model, cifar.task(seed), 50)
    return found | {"norms anew": cifar.accuracy(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/oscillations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    cifar, out = Cifar(), Path(given.out)
    before = kept(out / "rounded.json", {}, lambda: {f"at {b}": cifar.accuracy(rounded(cifar, cifar.model(), b)) for b in CROSS}
                  | {"full precision": cifar.accuracy(cifar.model())})
    results: dict[str, list[dict[str, Any]]] = {}

    def run(name: str, bits: int, seed: int, strength: float | None = None) -> dict[str, Any]:
        settings = {"bits": bits, "seed": seed, "steps": given.steps, "lr": given.lr} | ({} if strength is None else {"lambda": strength})
        where = out / f"b{bits}-{name}{'' if strength is None else f'-lambda{strength:g}'}-s{seed}.json"
        return kept(where, settings, partial(one, cifar, name, bits, seed, given.steps, given.lr, strength))

    best = {bits: max(LAMBDAS, key=lambda s: run("induce", bits, 0, s)["choice"]) for bits in AT}
    for seed in range(given.seeds):
        for bits, names in AT.items():
            for name in names:
                row = run(name, bits, seed, best[bits] if name == "induce" else None)
                results.setdefault(f"{bits} bits, {name}" + (f", lambda {best[bits]:g}" if name == "induce" else ""), []).append(row)
    text = section(before, results)
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "oscillations", text))


def section(before: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
    """The table."""
    keys = [f"at {b}" for b in CROSS]
    lines = ["| | accuracy | " + " | ".join(keys) + " | norms anew | edges | turning |", "|---" * (len(keys) + 5) + "|",
             f"| full precision | {before['full precision']:.2f} |" + " |" * (len(keys) + 3),
             "| the checkpoint, rounded | | " + " | ".join(f"{before[key]:.2f}" for key in keys) + " | | | |"]
    for name, runs in results.items():
        lines.append(f"| {name} | " + " | ".join(means(runs, "accuracy", *keys, "norms anew", "edges", "turning")) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
