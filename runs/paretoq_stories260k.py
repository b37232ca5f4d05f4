"""ParetoQ, its grids, LSQ and round-to-nearest at 4, 3, 2, 1.58 and 1 bits, on a real, pretrained Llama of 260,032 parameters.

Text, model and judgement are those of lsq_stories260k.py: the model wrote the training text, the real stories are unseen. One scale an output
channel, every linear layer but the head. All trained rows see the same text in the same order for the same seed, the same steps, schedule (5 %
warm-up, cosine), relative learning rate of scales and loss (the full-precision logits; with --labels the paper's cross entropy). Only the grid, its
start and its gradient factor differ. Rates are chosen for each row by itself, at seed 0, on the held-out part of the written text, never on the real
stories.

    rows      round-to-nearest (steps of least squared error; 1 bit: mean|w|), LSQ (none at 1 bit), ParetoQ; ParetoQ's other grids at 1.58, 2 and 4
              bits; ParetoQ from random weights at 2 bits (by labels: is a checkpoint worth it?); full precision trained as long, by labels
    moved     the mean over layers of |W - W0| / |W0|, W the trained full-precision weights behind the grid, W0 those before training

    python runs/paretoq_stories260k.py [--out out/paretoq_stories260k] [--seeds 3] [--steps 150] [--lr 1e-3 3e-3] [--labels] [--stories 1024]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from lsq_stories260k import longer, perplexity, rounded, setting
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qatlas.core.grid import Sign
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMean, MseSearch
from qatlas.model.load import load
from qatlas.model.rules import quantized
from qatlas.papers.lsq import lsq, signed
from qatlas.papers.paretoq import paretoq
from qatlas.train.evaluate import evaluate
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

BITS = (4, 3, 2, 1.58, 1)
OTHERS = {4: ("stretched",), 2: ("integer", "half"), 1.58: ("integer",)}


def rows() -> dict[str, tuple]:
    """Name -> the paper as it is called, whether from a random start."""
    out = {}
    for bits in BITS:
        if bits != 1:
            out[f"{bits} bits, LSQ"] = (partial(lsq, bits=bits), False)
        out[f"{bits} bits, ParetoQ"] = (partial(paretoq, bits=bits), False)
        for grid in OTHERS.get(bits, ()):
            out[f"{bits} bits, ParetoQ, grid {grid}"] = (partial(paretoq, bits=bits, grid=grid), False)
    return out | {"2 bits, ParetoQ, random start": (partial(paretoq, bits=2), True)}


def moved(model: nn.Module, start: dict[str, torch.Tensor]) -> float:
    """How far the weights behind the grid went, relative to their size."""
    apart = [float((layer.weight.detach() - start[name]).norm() / start[name].norm()) for name, layer in quantized(model).items()]
    return statistics.mean(apart)


def one(name: str, paper, scratch: bool, lr: float, seed: int, given, place: tuple) -> dict:
    """One trained run: perplexity on the real stories, loss on the held-out text, relative change of the weights; kept, and not repeated."""
    folder, tokenizer, parts, real = place
    short = name.replace(", ", "-").replace(" ", "_")
    where = Path(given.out) / "runs" / f"{short}-lr{lr:g}-s{seed}-{given.steps}{'-labels' if given.labels else ''}.json"
    if where.exists():
        return json.loads(where.read_text())
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)) if scratch else load(str(folder))[0]
    start = {key: p.detach().clone() for key, p in ((k.removesuffix(".weight"), v) for k, v in model.named_parameters())}
    # A random model has no logits worth learning from, so it learns from labels.
    task = LanguageModelling(parts, tokenizer, length=256, batch=8, run=Run(None, seed=seed))
    model = paper(model, task, lr=lr, scale_lr=0.01, warmup=0.05, steps=given.steps, distil=not (given.labels or scratch))
    kept = {"perplexity": perplexity(model, tokenizer, real), "held out": evaluate(model, task)["loss"], "moved": moved(model, start), "lr": lr,
            "seconds": time.perf_counter() - began}
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(kept))
    print(where.stem, f"{kept['perplexity']:.3f}", f"moved {kept['moved']:.3f}", f"{kept['seconds']:.0f} s", flush=True)
    return kept


def untrained(folder: Path, tokenizer, real: str) -> dict[str, float]:
    """Perplexity after rounding alone."""
    quants = {bits: Quant(Sign(), scale=AbsMean()) if bits == 1 else Quant(signed(bits), scale=MseSearch()) for bits in BITS}
    return {f"{bits} bits, round-to-nearest": perplexity(rounded(folder, quant), tokenizer, real) for bits, quant in quants.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/paretoq_stories260k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--stories", type=int, default=1024)
    given = parser.parse_args()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    folder, model, tokenizer, parts, real = setting(Path(os.environ["QATLAS_DATA"]), out, given.stories)
    place, results = (folder, tokenizer, parts, real), {}
    for name, (paper, scratch) in rows().items():
        tried = [one(name, paper, scratch, lr, 0, given, place) for lr in given.lr]
        best = min(tried, key=lambda kept: kept["held out"])
        results[name] = [best, *(one(name, paper, scratch, best["lr"], seed, given, place) for seed in range(1, given.seeds))]
    plain = {"full precision": [perplexity(model, tokenizer, real)],
             "full precision, trained as long": [perplexity(longer(folder, tokenizer, parts, given.steps, seed), tokenizer, real)
                                                 for seed in range(given.seeds)]}
    plain |= {name: [value] for name, value in untrained(folder, tokenizer, real).items()}
    (out / "results.json").write_text(json.dumps({"trained": results, "untrained": plain, "arguments": vars(given)}, indent=1))
    print("| | perplexity | moved | lr |\n|---|---|---|---|")
    for name, values in plain.items():
        print(f"| {name} | {told(values)} | | |")
    for name, kept in results.items():
        print(f"| {name} | {told([k['perplexity'] for k in kept])} | {told([k['moved'] for k in kept], 3)} | {kept[0]['lr']:g} |")


def told(values: list[float], digits: int = 2) -> str:
    """Mean and spread."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


if __name__ == "__main__":
    main()
