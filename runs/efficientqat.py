"""EfficientQAT's two phases against either alone, rounding, and LSQ at equal cost, on two real language models.

    stories   stories260K as in lsq_stories260k.py: the model wrote the training text itself; the perplexity is of five real stories. Groups of 32;
              down_proj, whose 172 inputs no group divides, by channel; 8 x 128 tokens a step; 3 and 4 bits with one seed
    zoo       the zoo's Llama of 3.4 million parameters on its own text, groups of 64 and 128, one seed; the perplexity is of 48 held-out windows

A step of every block costs what a step of the model costs: N steps a block and E end to end stand beside LSQ with N + E steps, in the same order of
data. All rows of a model and bits see the same text for the same seed. LSQ has the paper's grid around zero; the others a zero a group.

    python runs/efficientqat.py --model stories|zoo [--out docs/evidence/efficientqat] [--seeds 3] [--page FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kept import kept
from pages import between
from paretoq_bits import Place
from told import told
from torch import nn

from qatlas.core.grain import PerChannel
from qatlas.model.rules import Rule
from qatlas.papers.efficientqat import efficientqat, of_weight
from qatlas.papers.lsq import lsq
from qatlas.train import data
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

FULL = "full precision"
COST = {"stories": (60, 40), "zoo": (20, 20)}                    # N steps a block, E end to end
RATES = {"block_lr": 1e-3, "block_scale_lr": 1e-3, "lr": 1e-3}


def rows(bits: int, group: int, n: int, e: int) -> dict[str, Callable[[nn.Module, Any], nn.Module]]:
    """Name -> what is done to the model."""
    def ours(**more: Any) -> Callable[[nn.Module, Any], nn.Module]:
        return lambda model, task: efficientqat(model, task, bits=bits, group=group, batches=32, **{**RATES, **more})

    return {
        "rounding": ours(block_steps=0, steps=0),
        "E2E-QP alone": ours(block_steps=0, steps=n + e),
        "Block-AP, steps and zeros only": ours(block_steps=n + e, steps=0, block_lr=0.0),
        "Block-AP alone": ours(block_steps=n + e, steps=0),
        "Block-AP, then E2E-QP": ours(block_steps=n, steps=e),
        "LSQ": lambda model, task: lsq(model, task, bits=bits, group=group, lr=1e-3, steps=n + e),
    }


def task_of(place: Place, seed: int, bits: int) -> LanguageModelling:
    """The task; of the zoo's held-out text the first 48 windows."""
    if place.name == "stories":
        per_row = (Rule("*.down_proj", weight=of_weight(bits, PerChannel())),)
        return LanguageModelling(place.text, place.tokenizer, length=128, batch=8, extra_rules=per_row, run=Run(None, seed=seed))
    text = data.text(place.text)
    task = LanguageModelling(text, place.tokenizer, length=256, batch=4, run=Run(None, seed=seed))
    task.windows[1], task.held_rows = task.windows[1][:48], 48
    return task


def one(place: Place, name: str, bits: int, group: int, seed: int, out: Path) -> dict[str, Any]:
    """One run, kept as a small file; one that is there is not repeated."""
    n, e = COST[place.name]
    where = out / f"{place.name}-b{bits}-g{group}-{name.replace(',', '').replace(' ', '-')}-s{seed}.json"
    settings = {"bits": bits, "group": group, "seed": seed, "N": n, "E": e, **RATES}

    def make() -> dict[str, Any]:
        torch.manual_seed(seed)
        task = task_of(place, seed, bits)
        model = place.model()
        model = rows(bits, group, n, e)[name](model, task) if name != FULL else model.eval()
        return place.judge(model, task) | {"blocks": [[h.loss[0], statistics.fmean(h.loss[-10:])] for h in task.run.histories]}

    return kept(where, settings, make)


def table(found: dict[tuple[int, int, str], list[dict[str, Any]]]) -> str:
    """By bits and group."""
    lines = ["| bits, group | | perplexity |", "|---|---|---|"]
    lines += [f"| {'' if name == FULL else f'{bits}, {group}'} | {name} | {told([run['perplexity'] for run in runs])} |"
              for (bits, group, name), runs in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(COST), required=True)
    parser.add_argument("--out", default="docs/evidence/efficientqat")
    parser.add_argument("--scratch", default="out/paretoq_stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=1024)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    place, out = Place(given.model, Path(given.scratch), given.stories), Path(given.out)
    small = given.model == "stories"
    asked = [(2, 32), (3, 32), (4, 32)] if small else [(2, 64), (2, 128), (3, 128), (4, 128)]
    found: dict[tuple[int, int, str], list[dict[str, Any]]] = {(2, asked[0][1], FULL): [one(place, FULL, 2, asked[0][1], 0, out)]}
    for seed in range(given.seeds if small else 1):
        for bits, group in asked:
            for name in rows(bits, group, *COST[given.model]):
                few = (small and bits > 2) or (not small and (bits, group) != (2, 64))        # the ordering is claimed at 2 bits
                if (few and (seed or name not in ("rounding", "Block-AP, then E2E-QP", "LSQ"))) or (name == "rounding" and seed):
                    continue
                found.setdefault((bits, group, name), []).append(one(place, name, bits, group, seed, out))
    text = table(dict(sorted(found.items(), key=lambda item: (item[0][2] != FULL, *item[0][:2]))))
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), f"efficientqat-{given.model}", text))


if __name__ == "__main__":
    main()
