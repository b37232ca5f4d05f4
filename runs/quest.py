"""QuEST against learned steps (LSQ) and largest-value steps with a straight-through gradient, weights and inputs at 4, 3, 2 and 1 bits alike.

    stories   stories260K, a pretrained Llama of 260,032 parameters, on the text that it writes itself (lsq_stories260k.py); the perplexity is of five
              real stories. Its widths are 64 and 172: the rotation is in blocks of 64 and of 4
    scratch   a Llama of 0.4 million parameters (width 128, two layers) from random weights on the same text; the loss is of its held-out part

All rows of a model and seed see the same text in the same order for the same steps, with the same optimizer, schedule and learning rate, and learn
from the text alone. Every linear layer but the head; a fresh step a row and a token, but LSQ's, which learns one a row and one an input tensor.

    full precision            trained as long
    QuEST                     the paper: rotation, Gaussian steps, trust (the clip form at 1 bit)
    no rotation               hadamard=None
    all gradients             trust=inf: the same numbers, a plain straight-through gradient
    trust                     at 1 bit: trust of half a step in place of the clip form
    absmax, all gradients     the largest value on the last level (1 bit: mean|x|), a plain straight-through gradient, no rotation
    LSQ                       learned steps, a row and an input tensor; none at 1 bit

    python runs/quest.py --model scratch|stories [--out docs/evidence/quest] [--seeds 3] [--page FILE]
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import kept
from lsq_stories260k import perplexity, setting
from pages import between
from told import told
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel, PerToken
from qatlas.core.grid import Sign, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned
from qatlas.model.load import load
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.lsq import of_input, signed
from qatlas.papers.quest import quest
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling

BITS, FULL = (4, 3, 2, 1), "full precision"
SETTINGS = {"scratch": {"steps": 200, "lr": 3e-3, "batch": 8, "length": 64}, "stories": {"steps": 60, "lr": 1e-3, "batch": 8, "length": 64}}
Train = Callable[..., Any]


def plain(model: nn.Module, task: LanguageModelling, *, lr: float, steps: int, weight: Quant | None = None, inputs: Quant | None = None) -> None:
    """These Quants, or full precision, under QuEST's optimizer and schedule; learned steps at LSQ's relative rate."""
    if weight is not None:
        quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=weight, input=inputs)], task)
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=0.1, betas=(0.9, 0.95), scale_share=0.01), schedule=cosine(0.1, end=0.1), steps=steps)


def absmax(bits: int) -> Train:
    """Largest-value steps with a straight-through gradient."""
    grid, scale = (Sign(), AbsMean()) if bits == 1 else (Uniform(bits, narrow=True), AbsMax())
    weight, inputs = (Quant(grid, grain, scale) for grain in (PerChannel(), PerToken()))
    return partial(plain, weight=weight, inputs=inputs)


def learned(bits: int) -> Train:
    """The Quants of `lsq` with static inputs."""
    return partial(plain, weight=Quant(signed(bits), PerChannel(), Learned(AbsMean(2.0, per_root=True)), Clip()), inputs=of_input(bits, static=True))


def rows() -> dict[str, Train]:
    """Name -> how it is trained."""
    out: dict[str, Train] = {FULL: plain}
    for bits in BITS:
        paper = partial(quest, bits=bits, input_bits=bits)
        out[f"{bits} bits, QuEST"] = paper
        if bits <= 2:
            out[f"{bits} bits, QuEST, no rotation"] = partial(paper, hadamard=None)
            out[f"{bits} bits, QuEST, all gradients"] = partial(paper, trust=math.inf)
        if bits == 1:
            out["1 bits, QuEST, trust"] = partial(paper, trust=math.sqrt(2 / math.pi))
        if bits > 1:                                              # one bit has no LSQ
            out[f"{bits} bits, LSQ"] = learned(bits)
        out[f"{bits} bits, absmax, all gradients"] = absmax(bits)
    return out


class Place:
    """A model, its text, and how it is judged."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.settings = name, SETTINGS[name]
        self.folder, _, self.tokenizer, self.text, self.real = setting(Path(os.environ["QATLAS_DATA"]), scratch, 1024)

    def model(self, seed: int) -> nn.Module:
        """The checkpoint, or random weights of this seed."""
        if self.name == "stories":
            return load(str(self.folder))[0]
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                                            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True))

    def task(self, seed: int) -> LanguageModelling:
        return LanguageModelling(self.text, self.tokenizer, length=self.settings["length"], batch=self.settings["batch"], run=Run(None, seed=seed))

    def judge(self, model: nn.Module, task: LanguageModelling) -> float:
        """The loss, or the perplexity of real stories."""
        return perplexity(model, self.tokenizer, self.real) if self.name == "stories" else evaluate(model, task)["loss"]


def one(name: str, train: Train, seed: int, place: Place, out: Path) -> dict[str, Any]:
    """One run."""
    def make() -> dict[str, Any]:
        model, task = place.model(seed), place.task(seed)
        try:
            train(model, task, lr=place.settings["lr"], steps=place.settings["steps"])
        except Exception as error:                                # a baseline that diverges is a result
            return {"judged": math.nan, "ended": f"{type(error).__name__}: {str(error)[:80]}"}
        norms = task.run.histories[0].grad_norm
        return {"judged": place.judge(model, task), "largest gradient norm after warm-up": max(norms[len(norms) // 10:])}

    return kept(out / f"{place.name}-{name.replace(',', '').replace(' ', '-')}-s{seed}.json", place.settings | {"seed": seed}, make)


def section(results: dict[str, list[float]], what: str) -> str:
    """The table: a row a way, a column a number of bits."""
    ways = list(dict.fromkeys(name.partition(" bits, ")[2] for name in results if name != FULL))
    lines = [f"Full precision, trained as long: {told(results[FULL], 3)} ({what}).\n", f"| {what} | {' | '.join(f'W{b}A{b}' for b in BITS)} |",
             "|---" * (len(BITS) + 1) + "|"]
    for way in ways:
        cells = [told(results[f"{bits} bits, {way}"], 3) if f"{bits} bits, {way}" in results else "" for bits in BITS]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--out", default="docs/evidence/quest", type=Path)
    parser.add_argument("--scratch", default="out/quest_stories", type=Path, help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", type=Path, help="the file whose section is made anew")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    place = Place(given.model, given.scratch)
    results: dict[str, list[float]] = {name: [] for name in rows()}
    for seed in range(given.seeds):
        for name, train in rows().items():
            results[name].append(one(name, train, seed, place, given.out)["judged"])
    text = section(results, "perplexity" if given.model == "stories" else "held-out loss")
    print(text)
    if given.page:
        given.page.write_text(between(given.page.read_text(), f"quest-{given.model}", text))


if __name__ == "__main__":
    main()
