"""Judging changes nothing."""

import pytest
import torch
from tiny import llama, task

from qatlas.train.evaluate import evaluate


def test_modes_are_restored_one_by_one():
    model, subject = llama(dropout=0.5).train(), task()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    one, two = evaluate(model, subject), evaluate(model, subject)
    assert one == two and [m.training for m in model.modules()] == before
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error():
    class Fails:
        def score(self, model):
            raise ZeroDivisionError

    model = llama().train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, Fails())
    assert model.training and torch.is_grad_enabled()
