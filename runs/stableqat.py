"""StableQAT against LSQ and a scaled straight-through gradient, weights at 4, 3 and 2 bits, on stories260K.

    LSQ          ParetoQ's code base with LSQ's integers, which is StableQAT with amplitude 0
    StableQAT    amplitude 0.21
    scaled       LSQ with dw multiplied by 0.302, the mean slope of StableQAT: it separates shape from size (Adam should see no difference)
    ParetoQ      2 bits only: its stretched levels

All rows see the same text in the same order for the same seed, steps, schedule and relative rate of the steps, and learn from the text alone, at each
of some learning rates; the claim is a better mean over them and a smaller spread. The perplexity is of five real stories; model and text as in
lsq_stories260k.py.

    python runs/stableqat.py [--out docs/evidence/stableqat] [--seeds 3] [--lr 1e-4 1e-3 3e-3] [--page FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kept import kept
from pages import between
from quest import Place, Train
from told import told
from torch import Tensor, nn

from qatlas.core.estimator import Clip
from qatlas.core.grid import Grid
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.paretoq import of_weight, paretoq
from qatlas.papers.stableqat import stableqat
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling

BITS, STEPS = (4, 3, 2), 60


@dataclass(frozen=True)
class Scaled(Clip):
    """Clip's gradient, times StableQAT's mean slope."""

    def __call__(self, g: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return 0.302 * super().__call__(g, u, v, grid)


def scaled(model: nn.Module, task: LanguageModelling, *, bits: int, lr: float, steps: int, scale_lr: float) -> None:
    """As stableqat, with `Scaled`."""
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=of_weight(bits, "integer").but(estimator=Scaled()))])
    fit(model, task, optimizer=AdamW(lr=lr, scale_share=scale_lr), schedule=cosine(), steps=steps)


def rows() -> dict[str, Train]:
    """Name -> how it is trained."""
    out: dict[str, Train] = {}
    for bits in BITS:
        out[f"{bits} bits, LSQ"] = partial(stableqat, bits=bits, amplitude=0.0)
        out[f"{bits} bits, StableQAT"] = partial(stableqat, bits=bits)
        out[f"{bits} bits, scaled"] = partial(scaled, bits=bits)
    out["2 bits, ParetoQ"] = partial(paretoq, bits=2)
    return out


def one(name: str, train: Train, lr: float, seed: int, place: Place, out: Path) -> float:
    """The perplexity of one run."""
    settings = {"lr": lr, "seed": seed, "steps": STEPS, "batch": place.settings["batch"], "length": place.settings["length"]}

    def make() -> dict[str, Any]:
        model, task = place.model(seed), place.task(seed)
        train(model, task, lr=lr, scale_lr=0.01, steps=STEPS)
        return {"judged": place.judge(model, task)}

    return kept(out / f"{name.replace(',', '').replace(' ', '-')}-lr{lr:g}-s{seed}.json", settings, make)["judged"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/stableqat", type=Path)
    parser.add_argument("--scratch", default="out/quest_stories", type=Path, help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-3, 3e-3])
    parser.add_argument("--page", type=Path, help="the file whose section is made anew")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    place = Place("stories", given.scratch)
    found: dict[tuple[str, float], list[float]] = {}
    for seed in range(given.seeds):
        for name, train in rows().items():
            for lr in given.lr:
                found.setdefault((name, lr), []).append(one(name, train, lr, seed, place, given.out))
    lines = [f"| | {' | '.join(f'lr {lr:g}' for lr in given.lr)} | mean over rates | largest / smallest |", "|---" * (len(given.lr) + 3) + "|"]
    for name in rows():
        means = [statistics.mean(found[name, lr]) for lr in given.lr]
        cells = [*(told(found[name, lr]) for lr in given.lr), f"{statistics.mean(means):.2f}", f"{max(means) / min(means):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.page:
        given.page.write_text(between(given.page.read_text(), "stableqat", text))


if __name__ == "__main__":
    main()
