"""FPQ against its base and its halves: a pretrained ResNet-20 on CIFAR-10, weights of 2 bits, inputs of 4.

All rows start from the same checkpoint and see the same batches in the same order for the same seed; AdamW, cosine, one learning rate, 60 steps.

    LSQ         no noise, no teacher: the control
    SFP, CSD    noise of one step on a tenth of the inputs; the channel-wise teacher
    FPQ         both;  `FPQ, p = 1`: noise on all inputs, always
    trace       of the Hessian of the cross entropy on 50 test images, at the quantized point (Hutchinson, 8 vectors, the same for all rows)
    jitter      mean squared change of the logits under Gaussian noise of deviation 0.1 on the (normalised) test images

    python runs/fpq.py [--out docs/evidence/fpq] [--seeds 3] [--steps 60] [--page FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar_rows import Cifar
from kept import kept
from pages import between
from told import means
from torch import nn

from qatlas.papers.fpq import fpq
from qatlas.train.evaluate import judged
from qatlas.train.sharpness import trace

ROWS: dict[str, dict[str, float]] = {"LSQ": {"p": 0.0, "csd": 0.0}, "SFP": {"p": 0.1, "csd": 0.0}, "CSD": {"p": 0.0, "csd": 1.0},
                                     "FPQ": {"p": 0.1, "csd": 1.0}, "FPQ, p = 1": {"p": 1.0, "csd": 1.0}}


def jitter(model: nn.Module, cifar: Cifar) -> float:
    """Mean squared change of the logits of 250 images under noise, drawn once."""
    x = next(iter(cifar.test.held_out()))["pixel_values"]
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with judged(model):
        return float((model(x + noise).logits - model(x).logits).square().mean())


def one(cifar: Cifar, row: dict[str, float], seed: int, steps: int, lr: float) -> dict[str, Any]:
    """One trained row."""
    model = fpq(cifar.model(), cifar.task(seed), bits=2, input_bits=4, lr=lr, steps=steps, **row)
    batch = {name: value[:50] for name, value in next(iter(cifar.test.held_out())).items()}
    return {"accuracy": cifar.accuracy(model), "trace": trace(model, cifar.test.loss, [batch], probes=8), "jitter": jitter(model, cifar)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/evidence/fpq")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    cifar = Cifar()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name, row in ROWS.items():
            where = Path(given.out) / f"{name.replace(', ', '-').replace(' ', '')}-s{seed}.json"
            made = partial(one, cifar, row, seed, given.steps, given.lr)
            results.setdefault(name, []).append(kept(where, {"seed": seed, "steps": given.steps, "lr": given.lr} | row, made))
    lines = ["| | accuracy | trace | jitter |", "|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join([*means(runs, "accuracy"), *means(runs, "trace", digits=0), *means(runs, "jitter", digits=3)]) + " |"
              for name, runs in results.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "fpq", text))


if __name__ == "__main__":
    main()
