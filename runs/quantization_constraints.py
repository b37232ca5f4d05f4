"""Quantization constraints (PD-QAT) against straight-through training: a pretrained ResNet-20 on CIFAR-10, weights of 2 bits, inputs of 4.

All rows start from the same checkpoint and see the same batches in the same order for the same seed; AdamW, cosine, one learning rate, 60 steps. The
numbers are LSQ's (a learned step a channel); the full-precision network has batch norms of its own.

    straight-through   the same quantizers, trained by the labels: the control
    output             the output is constrained, and no layer;  `layers`: each layer, too
    layers, both       the shared weights hear the output through the low-bit network, too
    low, high          accuracy of the low-bit and of the full-precision network
    8 bits for ...     straight-through training anew, four layers at 8 bits: those with the largest final lambda of `layers` at the same seed, those
                       with the smallest, or four drawn at random

    python runs/quantization_constraints.py [--out docs/evidence/quantization_constraints] [--seeds 3] [--steps 60] [--page FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cifar_rows import ENDS, Cifar
from kept import kept
from pages import between
from told import means

from qatlas.model.rules import Rule, keep_full
from qatlas.papers.quantization_constraints import high, of_weight, quantization_constraints
from qatlas.train.tactic import Loop, Tactic

ROWS: dict[str, dict[str, Any]] = {"straight-through": {"constrained": False}, "output": {"layerwise": False}, "layers": {},
                                   "layers, both": {"both": True}}
MORE = ("largest", "smallest", "random")
KEPT = 4


class Both(Tactic):
    """The full-precision network, judged at the end."""

    def __init__(self, cifar: Cifar) -> None:
        self._cifar, self._found = cifar, {}  # type: ignore[var-annotated]

    def after(self, loop: Loop) -> None:
        if loop.step + 1 == loop.steps:
            with high(loop.model):
                self._found["high"] = self._cifar.accuracy(loop.model)


def one(cifar: Cifar, row: dict[str, Any], seed: int, given: argparse.Namespace, eight: list[str]) -> dict[str, Any]:
    """One trained row; `eight`: layers at 8 bits."""
    both = Both(cifar)
    task = cifar.task(seed, () if row.get("constrained") is False else (both,))
    task.extra_rules = (*keep_full(*ENDS), *(Rule(name, weight=of_weight("lsq", 8)) for name in eight))
    try:
        model = quantization_constraints(cifar.model(), task, bits=2, input_bits=4, static=True, eps_layer=given.eps, dual_lr=given.dual_lr,
                                         lr=given.lr, steps=given.steps, **row)
    finally:
        task.extra_rules = tuple(keep_full(*ENDS))
    return {"low": cifar.accuracy(model), "duals": model.qatlas_duals} | both._found


def layers(duals: dict[str, float], which: str, seed: int) -> list[str]:
    """Four layers by their lambda."""
    names = sorted((name for name in duals if name != "output"), key=lambda name: duals[name])
    if which == "random":
        return list(np.random.default_rng(seed).permutation(names)[:KEPT])
    return names[-KEPT:] if which == "largest" else names[:KEPT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/quantization_constraints")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1 / 255)
    parser.add_argument("--dual_lr", type=float, default=1.0)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    cifar = Cifar()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        settings = {"seed": seed, "steps": given.steps, "lr": given.lr, "eps": given.eps, "dual lr": given.dual_lr}
        for name, row in ROWS.items():
            where = Path(given.out) / f"{name.replace(', ', '-')}-s{seed}.json"
            results.setdefault(name, []).append(kept(where, settings, partial(one, cifar, row, seed, given, [])))
        duals = results["layers"][seed]["duals"]
        for which in MORE:
            eight = layers(duals, which, seed)
            where = Path(given.out) / f"eight-{which}-s{seed}.json"
            made = kept(where, settings | {"eight": [str(name) for name in eight]}, partial(one, cifar, ROWS["straight-through"], seed, given, eight))
            results.setdefault(f"8 bits for the {which} four", []).append(made)
    text = "| | low | high |\n|---|---|---|\n" + "".join(f"| {name} | " + " | ".join(means(runs, "low", "high")) + " |\n"
                                                          for name, runs in results.items())
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "quantization-constraints", text))


if __name__ == "__main__":
    main()
