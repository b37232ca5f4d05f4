"""Gradients that wait: one pull a step, the same gradients."""

from __future__ import annotations

import pytest
import torch
from parts import every
from torch import nn
from torch.utils.checkpoint import checkpoint

from qatlas.core import estimator
from qatlas.core.estimator import Clip, Estimator
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quantizer
from qatlas.layers.gathered import gathering, waits
from qatlas.layers.quantized import Quantized, kept
from qatlas.model.rules import quantize

ESTIMATORS = every(Estimator)


class Block(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.inner, self.again = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), again

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


def model(text="w4-g16", again=False):
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(32, 32), Block(again), nn.Linear(32, 2)), text).train()


@pytest.fixture
def counted(monkeypatch):
    """How often the formula and its closed-form gradients ran, by the shape of a view."""
    runs = {"values": 0, "pull": 0}
    real = {name: getattr(estimator, name) for name in ("values", "pulled")}

    def count(name, function):
        def run(*given, **more):
            runs[name] += 1
            return function(*given, **more)
        return run

    for module in (estimator, __import__("qatlas.core.quantizer", fromlist=["values"])):
        if hasattr(module, "values"):
            monkeypatch.setattr(module, "values", count("values", real["values"]))
    monkeypatch.setattr(estimator, "pulled", count("pull", real["pulled"]))
    return runs


def step(net, micros, gather):
    """The gradients of one step in so many micro-batches."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    with kept(net), gathering(net, gather):
        for i, part in enumerate(x.chunk(micros)):
            with waits(net, i + 1 < micros):
                net(part).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("again", [False, True])
def test_eight_micro_batches_cost_one_quantization_and_one_pull(counted, again):
    """Also where blocks are run again in the backward: nothing is quantized there."""
    net = model(again=again)
    weights = sum(isinstance(m, Quantized) for m in net.modules())
    step(net, 8, gather=True)
    assert counted == {"values": weights, "pull": weights}
    counted.update(values=0, pull=0)
    step(model(again=again), 8, gather=False)
    assert counted == {"values": weights, "pull": 8 * weights}


def test_gradients_are_those_of_every_micro_batch_by_itself():
    wanted, found = step(model(), 8, gather=False), step(model(), 8, gather=True)
    for name, g in wanted.items():
        if name.endswith("weight") or name.endswith("bias"):
            assert torch.equal(found[name], g), name              # a gate of a sum is the sum of the gated
        torch.testing.assert_close(found[name], g, rtol=1e-5, atol=1e-6 * float(g.abs().max()))


def test_a_layer_that_the_last_micro_batch_does_not_reach_is_told_too():
    net = model()
    with kept(net), gathering(net):
        with waits(net, True):
            net(torch.ones(2, 32)).sum().backward()
        assert net[0].weight.grad is None
        with waits(net, False):
            net[2](torch.ones(2, 32)).sum().backward()
    other = model()
    with kept(other):
        other(torch.ones(2, 32)).sum().backward()
    assert torch.equal(net[0].weight.grad, other[0].weight.grad) and net[0].waiting is None


def test_an_error_leaves_nothing_waiting():
    net = model()
    with kept(net), gathering(net):
        with pytest.raises(ZeroDivisionError), waits(net, True):
            net(torch.ones(2, 32)).sum().backward()
            raise ZeroDivisionError
        assert all(m.waiting.sum is None for m in net.modules() if isinstance(m, Quantized))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimator_is_linear_in_the_gradient(estimator):
    """What gathering rests on, of every part found by listing."""
    g, h = torch.randn(2, 8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(-9, 9, 512, dtype=torch.float64).view(8, 64)
    grid = Uniform(4)
    v = grid.snap(u)
    torch.testing.assert_close(estimator(g + h, u, v, grid), estimator(g, u, v, grid) + estimator(h, u, v, grid), rtol=1e-12, atol=1e-12)


def test_a_quantizer_without_gradient_stays_silent():
    """Undefined gradients pass through the formula's node as they are."""
    quantizer = Quantizer(model()[0].weight_quantizer.quant.but(estimator=Clip()))
    w = torch.randn(4, 32, requires_grad=True)
    quantizer.initialise(w)
    assert torch.autograd.grad(quantizer(w).sum() * 0 + w.sum(), w)[0].eq(1).all()


@pytest.mark.parametrize("keep", ["each", "buffer", "recompute"])
def test_checkpointing_gives_the_gradients_of_plain_blocks(keep):
    found = []
    for again in (False, True):
        net = model(again=again)
        for layer in net.modules():
            if isinstance(layer, Quantized):
                layer.keep = keep
        net(torch.randn(4, 32, generator=torch.Generator().manual_seed(2))).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
