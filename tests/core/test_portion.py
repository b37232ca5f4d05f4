"""What is computed in portions of rows is what is computed at once."""

from __future__ import annotations

import pytest
import torch

from qatlas.core import portion
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Ternary, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax

QUANTS = [Quant(Uniform(4), Group(32), Learned(), Clip()), Quant(Ternary(0.7), PerChannel(), AbsMean(), refit=True),
          Quant(Uniform(3, False), Group(16), Learned(MinMax()), Clip(0.5), clip=2.0), Quant(HalfStep(2), PerChannel(), Learned(), Clip()),
          Quant(Uniform(4), PerTensor(), Learned(), Clip()),
          Quant(Uniform(4), Group(32), AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax())))]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: f"{q.label} {type(q.grain).__name__}")
def test_portions_move_nothing(quant, monkeypatch):
    torch.manual_seed(0)
    w, g = torch.randn(50, 64), torch.randn(50, 64)
    found = []
    for size in (2**18, 256):                                     # at once; four rows at a time, the last portion shorter
        monkeypatch.setattr(portion, "SIZE", size)
        x, quantizer = w.clone().requires_grad_(), quant.build().initialise(w)
        y = quantizer(x)
        y.backward(g)
        found.append([y.detach(), x.grad, quantizer.hard(w), quant.hard(w), quantizer.known(w).value, *(p.grad for p in quantizer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_that_know_of_each_other_are_not_parted(monkeypatch):
    monkeypatch.setattr(portion, "SIZE", 64)
    x = torch.ones(20, 64)
    assert portion.divides(x, torch.ones(20, 1)) and not portion.divides(x, torch.ones(1, 1)) and not portion.divides(x[0])


def test_portions_keep_shapes_and_gaps(monkeypatch):
    monkeypatch.setattr(portion, "SIZE", 8)
    x = torch.arange(40.0).reshape(5, 2, 4)
    double, nothing, sums = portion.in_portions(lambda x, y: (2 * x, None, x.sum(-1, keepdim=True)), x, None)
    assert torch.equal(double, 2 * x) and nothing is None and torch.equal(sums, x.sum(-1, keepdim=True))
