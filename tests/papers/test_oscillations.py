"""Oscillations induced: the exact checks of the sheet, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import pytest
import torch
from tiny import Stop
from tiny import llama as tiny_llama
from tiny import task as lm
from torch import nn

from qatlas.core.error import QuantError, RunError
from qatlas.core.estimator import Ste
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.places import at_edges
from qatlas.model.quantized import quantized
from qatlas.papers.oscillations import inducing, of_weight, oscillations
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.teacher import full_precision


def layer(quant, out=6, inputs=10):
    torch.manual_seed(0)
    return nn.Sequential(QLinear.of(nn.Linear(inputs, out, bias=False, dtype=torch.float64), Slots(quant)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradient_of_r_points_from_the_level(bits):
    model = layer(of_weight(bits, detach=True))
    w, q = model[0].weight, model[0].hard()
    inducing(model).backward()
    torch.testing.assert_close(w.grad, 2 * (q - w.detach()) / w.numel(), rtol=1e-12, atol=1e-15)
    assert not w.grad[(w.abs() == w.abs().max())].any(), "the largest weight lies on a level"


@pytest.mark.parametrize("bits", [2, 3])
def test_the_step_hears_r_unless_it_is_detached(bits):
    model = layer(of_weight(bits))
    w = model[0].weight
    inducing(model).backward()
    top, q = 2 ** (bits - 1) - 1, model[0].hard()
    s, n = w.detach().abs().max() / top, w.numel()
    wanted, at = 2 * (q - w.detach()) / n, w.abs() == w.abs().max()
    u = w.detach() / s
    wanted[at] += (2 * q * (u.round() - u)).sum() / n * w.detach()[at].sign() / top
    torch.testing.assert_close(w.grad, wanted, rtol=1e-12, atol=1e-15)


def test_one_weight_oscillates_and_full_precision_with_the_term_walks_the_same_way():
    """The toy of the paper: x = 1, y = 0.63, s = 0.5, rate 0.05: the optimum of the rounded model is between two levels."""
    quantizer = Quantizer(Quant(Uniform(8), PerTensor(), Learned(AbsMax()), Ste())).initialise(torch.tensor([63.5]))
    quantizer.double()
    assert float(quantizer.scale) == 0.5
    rounded, full = (torch.tensor([0.6], dtype=torch.float64, requires_grad=True) for _ in range(2))
    ways = []
    for _ in range(400):
        (0.5 * (quantizer(rounded) - 0.63).square().sum()).backward()
        (0.5 * (full - 0.63).square() + 0.5 * (quantizer(full).square() - full.square())).sum().backward()
        with torch.no_grad():
            for w in (rounded, full):
                torch.testing.assert_close(w.grad, (w - 0.63) + (quantizer.hard(w) - w), rtol=0, atol=1e-14)
            for w in (rounded, full):
                w -= 0.05 * w.grad
                w.grad = None
        ways.append((float(rounded), float(full)))
    late = [w for w, _ in ways[50:]]
    assert all(a == pytest.approx(b, abs=1e-12) for a, b in ways)
    assert 0.732 - 1e-3 <= min(late) < 0.75 < max(late) <= 0.7565 + 1e-3


def test_lambda_zero_is_training_in_full_precision():
    other = tiny_llama()
    fit(other, lm(), optimizer=AdamW(lr=1e-3), schedule=cosine(0.05), steps=4)
    model = oscillations(tiny_llama(), lm(), strength=0.0, lr=1e-3, steps=4)
    with full_precision(model):
        found = dict(model.named_parameters())
        assert all(torch.equal(p, found[name]) for name, p in other.named_parameters())


def test_inducing_gathers_weights_at_the_edges():
    shares = [at_edges(oscillations(tiny_llama(), lm(), bits=3, strength=strength, lr=3e-3, steps=30)) for strength in (0.0, 30.0)]
    assert shares[1] > shares[0] + 0.1


def test_it_computes_rounded_once_training_is_over():
    model = oscillations(tiny_llama(), lm(), bits=2, steps=2)
    ids = torch.arange(24).view(2, 12) % 32
    rounded = model(ids).logits
    assert all(len(one.quantize().codes.unique()) <= 3 and torch.equal(one.computed(), one.hard()) for one in quantized(model).values())
    with full_precision(model):
        assert not torch.equal(model(ids).logits, rounded)


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return oscillations(tiny_llama(), task, lr=3e-2, steps=6)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=4)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrong, kind, words", [({"bits": 1}, QuantError, "2 to 8"), ({"strength": -1.0}, RunError, "0 or more")])
def test_what_cannot_work_is_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        oscillations(tiny_llama(), lm(), steps=1, **wrong)
