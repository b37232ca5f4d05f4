"""The demo's boring control: the full-precision model, trained for as many steps on the same text in the same order by the labels.

What the quantized model gains by its training must not be what any further training gains. The model was trained on this text until its held-out loss
rose, so more of the same is expected to make it worse: at the demo's learning rate, and at a tenth of it.

    python runs/demo_control.py [--steps 240] [--seeds 3]
"""

from __future__ import annotations

import argparse

from qatlas.demo import DATA, MODEL, STEPS
from qatlas.model.load import load
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    for lr in (2e-3, 2e-4):
        for seed in range(given.seeds):
            model, tokenizer = load(MODEL)
            task = LanguageModelling(DATA, tokenizer, length=256, batch=8, run=Run(None, seed=seed))
            fit(model, task, optimizer=AdamW(lr=lr), schedule=cosine(0.05), steps=given.steps)
            print(f"lr {lr}, seed {seed}: perplexity {evaluate(model, task)['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
