"""PB-LLM on stories260K: how much a few salient weights save, with and without training.

As in lsq_stories260k.py the model wrote the training text itself; the perplexity is of five real stories. All rows of a seed see the same text in the
same order; training is by the labels, as the paper's, with the same steps and rate for all.

    without training    all binarized (no salient weight); 10, 20, 50 % by size, rounded only; the same with GPTQ's compensation, by size and by
                        the Hessian
    with training       none, 10, 20, 50 % salient by the Hessian; 10 % by size; 10 % from the compensated weights

    python runs/pb_llm.py [--out docs/evidence/pb_llm] [--seeds 3] [--steps 150] [--lr 1e-3] [--page FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from kept import kept
from pages import between
from paretoq_bits import Place
from told import told

from qatlas.model.coverage import describe
from qatlas.model.quantized import quantized
from qatlas.papers.pb_llm import pb_llm
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

SHARES = (0.1, 0.2, 0.5)
PLAIN = {"metric": "magnitude", "compensate": False}


def rows(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> arguments."""
    out: dict[str, dict[str, Any]] = {"rounded, all signs": {"salient": 0.0, "steps": 0, **PLAIN}}
    for share in SHARES:
        out[f"rounded, {share:.0%} by size"] = {"salient": share, "steps": 0, **PLAIN}
        out[f"compensated, {share:.0%} by size"] = {"salient": share, "steps": 0, "metric": "magnitude"}
        out[f"compensated, {share:.0%} by Hessian"] = {"salient": share, "steps": 0}
    out["compensated, all signs"] = {"salient": 0.0, "steps": 0, "metric": "magnitude"}
    out["trained, all signs"] = {"salient": 0.0, "steps": steps, **PLAIN}
    out |= {f"trained, {share:.0%} by Hessian": {"salient": share, "steps": steps} for share in SHARES}
    out["trained, 10% by size"] = {"salient": 0.1, "steps": steps, **PLAIN}
    out["trained from compensated, 10% by Hessian"] = {"salient": 0.1, "steps": steps, "compensate": True}
    return out


def one(place: Place, name: str, arguments: dict[str, Any], seed: int, lr: float, out: Path) -> dict[str, Any]:
    """One run, kept as a small file; one that is there is not repeated."""
    where = out / f"stories-{name.replace(',', '').replace(' ', '-').replace('%', '')}-s{seed}.json"
    settings = {"seed": seed, "lr": lr, **arguments}

    def make() -> dict[str, Any]:
        torch.manual_seed(seed)
        task = LanguageModelling(place.text, place.tokenizer, length=128, batch=8, run=Run(None, seed=seed))
        model = pb_llm(place.model(), task, lr=lr, **arguments)
        own = [row for row in describe(model).rows if row.weight != "full"]
        bits = sum(row.bits * torch.Size(row.shape).numel() for row in own) / sum(torch.Size(row.shape).numel() for row in own)
        return place.judge(model, task) | {"bits": bits, "layers": len(own), "trainable": len(quantized(model))}

    return kept(where, settings, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/pb_llm")
    parser.add_argument("--scratch", default="out/paretoq_stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--stories", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    Path(given.scratch).mkdir(parents=True, exist_ok=True)
    place, out = Place("stories", Path(given.scratch), given.stories), Path(given.out)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name, arguments in rows(given.steps).items():
            found.setdefault(name, []).append(one(place, name, arguments, seed, given.lr, out))
    lines = ["| | bits a weight | perplexity |", "|---|---|---|"]
    for name, runs in found.items():
        bits = runs[0]["bits"] - (not runs[0]["salient"])         # where nothing is salient no mask is needed
        lines.append(f"| {name} | {bits:.2f} | {told([run['perplexity'] for run in runs])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "pb_llm", text))


if __name__ == "__main__":
    main()
