"""ParetoQ, its grids, LSQ and round-to-nearest at 4, 3, 2, 1.58 and 1 bits, on two real language models.

    stories   stories260K, a pretrained Llama of 260,032 parameters; text and judgement as in lsq_stories260k.py: the model wrote the training text
              itself, the perplexity is of five real stories that nothing was trained on
    zoo       the zoo's Llama of 3.4 million parameters on its own text; the perplexity is of the held-out text

One scale an output channel, every linear layer but the head. All trained rows of a model see the same text in the same order for the same seed, the
same steps, schedule (5 % warm-up, cosine), relative learning rate of scales and loss: the full-precision logits, but for the rows that say labels.
Only the grid, its start and its gradient factor differ. Where several rates are given (--lr 1e-3 3e-3) each row has its own, chosen at seed 0
by the loss on the held-out part of the text: that is never the real stories, but on the zoo it is the text that judges.

    rows      round-to-nearest (steps of least squared error; 1 bit: mean|w|), LSQ (none at 1 bit), ParetoQ, ParetoQ's other grids; at 2 bits by the
              labels from the checkpoint and from random weights (stories); full precision trained as long, by labels
    moved     the mean over layers of |W - W0| / |W0|, W the trained full-precision weights behind the grid, W0 those before training

    python runs/paretoq_bits.py --model stories|zoo [--out out/paretoq] [--seeds 3] [--steps 150] [--batch 8] [--lr 1e-3] [--page FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import kept
from lsq_stories260k import perplexity, setting
from pages import between
from told import told
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qatlas.core.grid import Sign
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMean, MseSearch
from qatlas.model.load import load
from qatlas.model.quantized import quantized
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.lsq import lsq, signed
from qatlas.papers.paretoq import paretoq
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling

BITS = (4, 3, 2, 1.58, 1)
OTHERS = {"stories": {4: ("stretched",), 2: ("integer", "half"), 1.58: ("integer",)}, "zoo": {2: ("integer",)}}
FULL = "full precision"


@dataclass
class Row:
    """A row that trains: the paper as it is called (None: full precision), by labels or taught, from the checkpoint or from random weights."""

    paper: Any
    labels: bool = False
    random: bool = False


def rows(model: str) -> dict[str, Row]:
    """Name -> what is trained."""
    out = {}
    for bits in BITS:
        if bits != 1:
            out[f"{bits} bits, LSQ"] = Row(partial(lsq, bits=bits))
        out[f"{bits} bits, ParetoQ"] = Row(partial(paretoq, bits=bits))
        for grid in OTHERS[model].get(bits, ()):
            out[f"{bits} bits, ParetoQ, grid {grid}"] = Row(partial(paretoq, bits=bits, grid=grid))
    if model == "stories":
        out["2 bits, ParetoQ, labels"] = Row(partial(paretoq, bits=2), labels=True)
        out["2 bits, ParetoQ, labels, random start"] = Row(partial(paretoq, bits=2), labels=True, random=True)
    out[f"{FULL}, trained as long, labels"] = Row(None, labels=True)
    return out


class Place:
    """A model, its text, and how it is judged."""

    def __init__(self, name: str, out: Path, stories: int) -> None:
        self.name = name
        if name == "stories":
            self.source, _, self.tokenizer, self.text, self.real = setting(Path(os.environ["QATLAS_DATA"]), out, stories)
        else:
            self.source, self.text, self.real = "zoo:gpt", "builtin:docs", None
            self.tokenizer = load(self.source)[1]

    def model(self, random: bool = False) -> nn.Module:
        """The checkpoint, or the same architecture with weights as transformers draws them."""
        model = load(str(self.source))[0]
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict())) if random else model

    def task(self, seed: int, batch: int = 8) -> LanguageModelling:
        return LanguageModelling(self.text, self.tokenizer, length=256, batch=batch, run=Run(None, seed=seed))

    def judge(self, model: nn.Module, task: LanguageModelling) -> dict[str, float]:
        """Perplexity on the text that judges, loss on the held-out part of the training text."""
        held = evaluate(model, task)
        return {"perplexity": perplexity(model, self.tokenizer, self.real) if self.real else held["perplexity"], "held out": held["loss"]}


def moved(model: nn.Module, start: dict[str, torch.Tensor]) -> float | None:
    """How far the weights behind the grid went, relative to their size."""
    apart = [float((layer.weight.detach() - start[name]).norm() / start[name].norm()) for name, layer in quantized(model).items()]
    return statistics.mean(apart) if apart else None


def one(name: str, row: Row, lr: float, seed: int, place: Place, given: argparse.Namespace) -> dict[str, Any]:
    """One trained run."""
    def make() -> dict[str, Any]:
        torch.manual_seed(seed)
        model, task = place.model(row.random), place.task(seed, given.batch)
        start = {key.removesuffix(".weight"): p.detach().clone() for key, p in model.named_parameters()}
        if row.paper is None:
            fit(model, task, optimizer=AdamW(lr=lr), schedule=cosine(0.05), steps=given.steps)
        else:
            row.paper(model, task, lr=lr, scale_lr=0.01, warmup=0.05, steps=given.steps, distil=not row.labels)
        return place.judge(model, task) | {"moved": moved(model, start)}

    return kept(Path(given.out) / f"{place.name}-{name.replace(',', '').replace(' ', '-')}-lr{lr:g}-s{seed}.json",
                {"lr": lr, "seed": seed, "steps": given.steps, "batch": given.batch}, make)


def untrained(place: Place) -> dict[str, float]:
    """Perplexity of full precision, and after rounding alone."""
    out = {FULL: place.judge(place.model().eval(), place.task(0))["perplexity"]}
    for bits in BITS:
        quant = Quant(Sign(), scale=AbsMean()) if bits == 1 else Quant(signed(bits), scale=MseSearch())
        model = quantize(place.model(), [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=quant)])
        out[f"{bits} bits, round-to-nearest"] = place.judge(model.eval(), place.task(0))["perplexity"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(OTHERS), required=True)
    parser.add_argument("--out", default="out/paretoq")
    parser.add_argument("--scratch", default="out/paretoq_stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--stories", type=int, default=1024)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    place, results = Place(given.model, Path(given.scratch), given.stories), {}
    plain = untrained(place)
    tried = {name: [one(name, row, lr, 0, place, given) for lr in given.lr] for name, row in rows(given.model).items()}
    best = {name: min(runs, key=lambda run: run["held out"]) for name, runs in tried.items()}
    results = {name: [run] for name, run in best.items()}
    for seed in range(1, given.seeds):
        for name, row in rows(given.model).items():
            results[name].append(one(name, row, best[name]["lr"], seed, place, given))
    text = section(plain, results)
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), f"paretoq-{given.model}", text))


def section(plain: dict[str, float], results: dict[str, list[dict[str, Any]]]) -> str:
    """The table: by bits, what was rounded first."""
    lines = ["| | perplexity | moved | learning rate |", "|---|---|---|---|"]
    for bits in (FULL, *(f"{bits} bits" for bits in BITS)):
        lines += [f"| {name} | {told([value])} | | |" for name, value in plain.items() if name.startswith(f"{bits}, ") or name == bits]
        for name, runs in results.items():
            if name.startswith(f"{bits}, "):
                went = [run["moved"] for run in runs if run["moved"] is not None]
                lines.append(f"| {name} | {told([run['perplexity'] for run in runs])} | {told(went, 3) if went else ''} | {runs[0]['lr']:g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
