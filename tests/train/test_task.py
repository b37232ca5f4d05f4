"""Tasks are functions of (seed, step)."""

import math

import pytest
import torch
from tiny import WORDS, letters, llama, task
from torch import nn

from qatlas.core.error import DataError
from qatlas.train import data
from qatlas.train.evaluate import evaluate
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling, shuffled


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_seed_and_step():
    one, two = task(), task()
    later = two.batch(7)
    assert same(one.batch(7), later) and same(one.batch(7), later) and one.fingerprint == two.fingerprint
    assert not same(one.batch(6), later)
    other = task(run=Run(seed=1))
    assert not same(other.batch(7), later) and other.fingerprint != one.fingerprint


def test_an_epoch_meets_each_row_once_and_epochs_differ():
    subject = task(batch=5)
    epochs = [shuffled(0, epoch, subject.rows) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(subject.rows)) for order in epochs) and list(epochs[0]) != list(epochs[1])
    steps = -(-2 * subject.rows // 5)
    rows = torch.cat([subject.batch(step)["input_ids"] for step in range(steps)])[: 2 * subject.rows]
    first, second = rows[: subject.rows], rows[subject.rows :]
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(subject.windows[0].tolist())


def test_windows_and_score():
    subject = task(length=16)
    flat = subject.windows[0].flatten().tolist()
    assert flat == letters(WORDS * 20)[: len(flat)]

    class Uniform(nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, 32)

    score = evaluate(Uniform(), subject)
    assert score["tokens"] == subject.held_rows * 15 and math.isclose(score["perplexity"], 32, rel_tol=1e-5)
    assert math.isclose(score["loss"], math.log(32), rel_tol=1e-6)


def test_score_weighs_by_tokens():
    model, subject = llama(), task(batch=3)                       # the last held-out batch is smaller
    together = task(batch=10_000)
    assert math.isclose(evaluate(model, subject)["loss"], evaluate(model, together)["loss"], rel_tol=1e-5)


@pytest.mark.parametrize("make, said", [
    (lambda: LanguageModelling(data.Text("short", WORDS), letters, length=16), "training text has 5 tokens"),
    (lambda: LanguageModelling(data.Text(WORDS, "short"), letters, length=16), "held-out text has 5 tokens"),
    (lambda: task(length=1), "predicts nothing"), (lambda: task(batch=0), "at least one row"),
])
def test_constructors_fail_early(make, said):
    with pytest.raises(DataError, match=said):
        make()
