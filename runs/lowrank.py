"""LR-QAT and L4Q beside what they are compared with, on stories260K (a pretrained Llama of 260,032 parameters).

    recover   the model's own kind of text, written by itself (lsq_stories260k.py), judged on five real stories: perplexity. 3 bits per channel and
              2 bits in groups of 32 (down_proj per channel: its 172 inputs are no multiple of 32)
    adapt     fine-tuned to another text, tiny Shakespeare; judged on its held-out twentieth: loss. 4 and 3 bits, groups of 32 likewise

    rows      round-to-nearest; LoRA in full precision, merged and rounded; PEQA (steps alone); LR-QAT; L4Q; LSQ, which trains all weights;
              QLoRA's order (rounded, then an adapter beside, merged and rounded again); QAT-LoRA (steps, and an adapter beside that stays);
              at 3 bits L4Q's other starts, with the share of weights that are cut at the end

All trained rows see the same batches in the same order for the same seed, and the same number of steps. Rates (RATES) are the same for all rows that
train the same thing; they were not searched.

    python runs/lowrank.py [--out docs/evidence/lowrank] [--scratch out/lowrank] [--seeds 3] [--steps 100] [--page docs/results.md]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import kept
from lsq_stories260k import perplexity, setting
from pages import between
from torch import nn

from qatlas.layers.adapter import Lora
from qatlas.layers.frozen import Cast
from qatlas.model.load import load
from qatlas.model.quantized import quantized
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers import l4q as l4q_file
from qatlas.papers import lr_qat as lr_qat_file
from qatlas.papers.l4q import l4q
from qatlas.papers.lr_qat import lr_qat
from qatlas.papers.lsq import lsq
from qatlas.train.data import Text
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling

MARK, RANK = "lowrank", 8
SETTINGS = {"recover": ((3, None), (2, 32)), "adapt": ((4, 32), (3, 32))}
RATES = {"recover": {"LoRA": 3e-3, "product": 1e-2, "inside": 3e-3, "steps": 1e-2, "LSQ": 1e-3},
         "adapt": {"LoRA": 1e-2, "product": 2e-2, "inside": 1e-2, "steps": 1e-2, "LSQ": 3e-3}}
STARTS = ("deviation", "absmax", "minmax")

Row = Callable[[nn.Module, LanguageModelling], nn.Module]


def of(bits: int, group: int | None) -> Any:
    """What round-to-nearest takes: L4Q's start, on which nothing is cut."""
    return l4q_file.of_weight(bits, group, "covering", False, False, None)


def rules(bits: int, group: int | None, **more: Any) -> list[Rule]:
    return [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*.down_proj", weight=of(bits, None)), Rule("*", weight=of(bits, group), **more)]


def rounded(model: nn.Module, task: LanguageModelling, bits: int, group: int | None, search: bool = False) -> nn.Module:
    """Round-to-nearest; with search, by LR-QAT's steps."""
    made = partial(lr_qat_file.of_weight, bits, symmetric=True, power=4.0) if search else partial(of, bits)
    return quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*.down_proj", weight=made(group=None)), Rule("*", weight=made(group=group))])


def beside(model: nn.Module, task: LanguageModelling, weight: bool, bits: int, group: int | None, steps: int, rates: dict[str, float],
           learn: bool = False) -> nn.Module:
    """An adapter beside a frozen weight, in full precision or rounded; `learn` trains the steps too."""
    more: dict[str, Any] = {"adapter": Lora(RANK, 2.0 * RANK, "beside"), "frozen": Cast(), "keep": "recompute"}
    told = rules(bits, group, **more) if weight else [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", **more)]
    model = quantize(model, told)
    train = ("*.adapter.*", *(("*.weight_quantizer.*",) if learn else ()))
    fit(model, task, train=train, optimizer=AdamW(lr=rates["LoRA"], scale_share=rates["steps"]), schedule=cosine(0.1), steps=steps)
    return model


@torch.no_grad()
def merged(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """A full-precision model whose weights are what the layers compute with, adapters beside them added."""
    for name, layer in quantized(model).items():
        fresh.get_submodule(name).weight.copy_(layer.hard() + layer.adapter.update())
    return fresh


def rows(which: str, steps: int, fresh: Callable[[], nn.Module]) -> dict[str, Row]:
    """Name -> how the model is made."""
    rates, out = RATES[which], {}
    for bits, group in SETTINGS[which]:
        at = {"bits": bits, "group": group}
        name = f"{bits} bits, "

        def lora_then(model: nn.Module, task: LanguageModelling, weight: bool = False, at: dict[str, Any] = at) -> nn.Module:
            return rounded(merged(beside(model, task, weight, **at, steps=steps, rates=rates), fresh()), task, **at)

        out[name + "round-to-nearest"] = partial(rounded, **at)
        out[name + "LoRA, merged, rounded"] = lora_then
        if which == "recover":
            out[name + "round-to-nearest, steps by search"] = partial(rounded, **at, search=True)
        else:
            out[name + "rounded, LoRA, merged, rounded again"] = partial(lora_then, weight=True)
            out[name + "QAT-LoRA (adapter stays)"] = partial(beside, weight=True, **at, steps=steps, rates=rates, learn=True)
        out[name + "PEQA (steps alone)"] = partial(lr_qat, **at, rank=1, lr=0.0, scale_lr=rates["steps"], steps=steps)
        out[name + "LR-QAT"] = partial(lr_qat, **at, rank=RANK, alpha=RANK, lr=rates["product"], scale_lr=rates["steps"], steps=steps)
        inside = {"rank": RANK, "alpha": 2.0 * RANK, "lr": rates["inside"], "scale_lr": rates["steps"], "steps": steps}
        out[name + "L4Q"] = partial(l4q, **at, **inside)
        if which == "adapt" and bits == 3:
            out |= {f"{name}L4Q, start {start}": partial(l4q, **at, **inside, start=start) for start in STARTS}
        out[name + "LSQ, all weights"] = partial(lsq, **at, lr=rates["LSQ"], scale_lr=rates["steps"], steps=steps)
    return out


class Place:
    """The model, the two texts, and how it is judged."""

    def __init__(self, which: str, scratch: Path, stories: int) -> None:
        data = Path(os.environ["QATLAS_DATA"])
        self.which = which
        self.folder, _, self.tokenizer, self.text, self.real = setting(data, scratch, stories)
        if which == "adapt":
            whole = (data / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
            cut = len(whole) * 19 // 20
            self.text = Text(whole[:cut], whole[cut:])

    def fresh(self) -> nn.Module:
        return load(str(self.folder))[0]

    def task(self, seed: int, bits: int, group: int | None, paper: Any) -> LanguageModelling:
        down = () if group is None or paper is None else (Rule("*.down_proj", weight=paper(bits)),)
        return LanguageModelling(self.text, self.tokenizer, length=128, batch=8, run=Run(None, seed=seed, progress=False), extra_rules=down)

    def judge(self, model: nn.Module, task: LanguageModelling) -> dict[str, float]:
        return {"perplexity": perplexity(model, self.tokenizer, self.real)} if self.which == "recover" else {"loss": evaluate(model, task)["loss"]}


def paper_of(name: str, row: Row) -> Any:
    """How the row's paper makes down_proj's Quant, per channel."""
    function, said = getattr(row, "func", None), getattr(row, "keywords", {})
    if function is lr_qat:
        return lambda bits: lr_qat_file.of_weight(bits, None, True, 4.0)
    if function is l4q:
        return lambda bits: l4q_file.of_weight(bits, None, said.get("start", "covering"), None, False, None)
    if function is lsq:
        return lambda bits: of(bits, None)
    return None


@torch.no_grad()
def cut(model: nn.Module) -> float | None:
    """The share of weights that lie outside of the grid, where L4Q trained."""
    found = []
    for layer in quantized(model).values():
        q = layer.weight_quantizer
        if layer.adapter is None or q is None or not isinstance(layer.slots.frozen, Cast) or layer.slots.adapter.place != "inside":
            return None
        place = q.place(view := q.quant.grain.view(layer.source()))
        u = (view - (0.0 if place.offset is None else place.offset)) / place.s
        found.append((~q.quant.grid.inside(u, 1e-3)).flatten().float())
    return float(torch.cat(found).mean())


def one(name: str, row: Row, seed: int, place: Place, given: argparse.Namespace) -> dict[str, Any]:
    """One run, kept as a small file; one that is there already is not repeated."""
    where = Path(given.out) / f"{place.which}-{name.replace(',', '').replace('(', '').replace(')', '').replace(' ', '-')}-s{seed}.json"
    settings = {"seed": seed, "steps": given.steps, "rates": RATES[place.which]}

    def make() -> dict[str, Any]:
        torch.manual_seed(seed)
        bits, group = next((b, g) for b, g in SETTINGS[place.which] if name.startswith(f"{b} bits"))
        task = place.task(seed, bits, group, paper_of(name, row))
        model = row(place.fresh(), task)
        return place.judge(model.eval(), task) | {"cut": cut(model)}

    return kept(where, settings, make)


def table(which: str, full: float, results: dict[str, list[dict[str, Any]]]) -> str:
    key = "perplexity" if which == "recover" else "loss"
    lines = [f"| {which} | {key} | cut at the end |", "|---|---|---|", f"| full precision, not trained | {full:.3f} | |"]
    for name, found in results.items():
        values = [run[key] for run in found]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and max(values) > min(values) else ""
        share = "" if found[0]["cut"] is None else f"{100 * statistics.mean(run['cut'] for run in found):.2f} %"
        lines.append(f"| {name} | {statistics.mean(values):.3f}{spread} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/lowrank")
    parser.add_argument("--scratch", default="out/lowrank", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--stories", type=int, default=1024)
    parser.add_argument("--which", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    texts = []
    for which in given.which:
        place = Place(which, Path(given.scratch), given.stories)
        asked = {name: row for name, row in rows(which, given.steps, place.fresh).items() if given.only in name}
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
        for seed in range(given.seeds):
            for name, row in asked.items():
                if seed == 0 or "round-to-nearest" not in name:
                    results[name].append(one(name, row, seed, place, given))
        full = place.fresh().eval()
        judged = place.judge(full, place.task(0, 4, None, None))
        texts.append(table(which, next(iter(judged.values())), results))
    text = (f"Rank {RANK}, {given.steps} steps of 8 x 128 tokens, {given.seeds} seeds, rates as in the script, not searched. `runs/lowrank.sh`.\n\n"
            + "\n".join(texts))
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), MARK, text))


if __name__ == "__main__":
    main()
