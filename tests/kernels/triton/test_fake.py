"""Fused fake quantization is the eager one: values and dx bit for bit, sums up to their order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip, Snap, Ste, Trust, forward, pull
from qatlas.core.floats import Float
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.place import Place
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax
from qatlas.kernels.triton.fake import Fused, check, fused, why_not

GRIDS = [Uniform(4), Uniform(8, False), Uniform(3, narrow=True), Uniform(16), HalfStep(2), HalfStep(8), Ternary(), Ternary(0.7), Sign()]
ESTIMATORS = [Ste(), Clip(), Clip(0.5), Clip(at=1.3), Trust(), Trust(0.3)]
SCALES = [AbsMax(), Learned(), Learned(margin=0.5), Learned(gradient="value"), Learned(MinMax()), Learned(MinMax(zero="offset"), margin=0.5),
          AbsMax(dtype="float16"), Learned(sign="abs")]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_eager_lines_bit_for_bit(grid, device):
    for i, estimator in enumerate(ESTIMATORS):
        for j, scale in enumerate(SCALES):
            if (i + j) % 2 == 0 or grid == Uniform(4):
                check(Fused(Quant(grid, PerChannel(), scale, estimator, clip=0.9 if (i + j) % 3 == 0 else None)), device)


@pytest.mark.parametrize(("shape", "grain"), [((5, 37), PerChannel()), ((3, 96), Group(32)), ((3, 5000), PerChannel()), ((70, 131), PerTensor()),
                                              ((1, 1), PerTensor()), ((130, 64), Group(16))], ids=str)
def test_shapes_and_tails(shape, grain, device):
    quant = Quant(Uniform(4), grain, Learned(MinMax()), Clip())
    x, g = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    view, gview = grain.view(x), grain.view(g)
    place, formula = quant.measure(view), Fused(quant)
    assert torch.equal(formula.values(view, place, None), forward(view, place, None, quant)[0])
    for ours, eager in zip(formula.pull(gview, view, place, None, 0.3), pull(gview, view, place, None, quant, 0.3), strict=True):
        if eager is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))


def test_nan_infinity_nothing_and_strides(device):
    quant = Quant(Uniform(4), PerChannel(), Learned(), Clip())
    formula, x = Fused(quant), torch.randn(4, 32)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    for view in (x.to(device), torch.empty(0, 8, device=device), torch.randn(32, 4, device=device).T, torch.randn(4, 32, dtype=torch.float64)):
        place, g = Place(torch.full_like(view[:, :1], 0.3)), torch.ones_like(view)
        assert torch.equal(formula.values(view, place, None).nan_to_num(9.0), forward(view, place, None, quant)[0].nan_to_num(9.0))
        number = ~view.isnan()                                    # of a NaN eager lines say one thing on CPU and another on a GPU
        assert torch.equal(formula.pull(g, view, place, None, 1.0)[0][number], pull(g, view, place, None, quant, 1.0)[0][number])
    shift = torch.full((4, 32), 0.6, device=device)
    x, place = torch.randn(4, 32).to(device), Place(torch.full((4, 1), 0.3, device=device))
    assert torch.equal(formula.values(x, place, shift), forward(x, place, shift, quant)[0])


def test_a_step_of_training_is_the_eager_one(device):
    """Through Snap: what is saved, and the gradients of weight and step."""
    quant, found = Quant(Uniform(4), Group(16), Learned(), Clip()), []
    for formula in (None, Fused(quant)):
        x = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        s = torch.full((6, 2, 1), 0.2, device=device, requires_grad=True)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            y = Snap.apply(x, s, None, None, None, None, quant, 0.1, formula)
        y.backward(torch.linspace(-1, 1, 192, device=device).reshape(6, 2, 16))
        found.append((y.detach(), x.grad, s.grad))
        assert sum(saved) == x.numel() + s.numel()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])


def test_a_model_while_it_lasts(device):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(4, 32, device=device))
    model.one, model.other = Quant(Uniform(4), scale=Learned()).build(), Quant(Float(2, 1)).build()
    model.one.initialise(model.weight)
    before = model.one(model.weight)
    with fused(model):
        assert isinstance(model.one.formula, Fused) and model.other.formula is None
        assert torch.equal(model.one(model.weight), before) and torch.equal(model.one.quantize(model.weight).dequantize(), before)
    assert model.one.formula is None


@pytest.mark.needs_no_triton
def test_what_is_left_to_the_eager_lines():
    nested = Quant(Uniform(6, False), PerTensor(), AbsMax())
    for quant, said in ((Quant(Float(2, 1)), "snap to Uniform"), (Quant(Uniform(4, None)), "snap to Uniform"),
                        (Quant(Ternary(0.7), scale=AbsMean(), refit=True), "refit"), (Quant(Uniform(4), scale=AbsMax(nested=nested)), "quantized")):
        assert said in why_not(quant)
        with pytest.raises(QuantError, match="no fused fake quantization"):
            Fused(quant)
    assert not why_not(Quant(Uniform(4)))


def test_a_compiler_that_is_wrong_is_refused(monkeypatch, device):
    quant = Quant(Uniform(4), scale=Learned())
    wrong = Fused(quant)
    monkeypatch.setattr(wrong, "values", lambda x, place, shift: forward(x, place, shift, quant)[0] * (1 + 2e-7))
    with pytest.raises(QuantError, match="other values than the eager one"):
        check(wrong, device)
    wrong = Fused(quant)
    monkeypatch.setattr(wrong, "pull", lambda g, x, place, *rest: (g, 2 * g.sum(-1, keepdim=True), None, None, None))
    with pytest.raises(QuantError, match="gradients of .* differ"):
        check(wrong, device)
    monkeypatch.setattr(wrong, "pull", lambda *rest: (None,) * 5)
    with pytest.raises(QuantError, match="not those of the eager"):
        check(wrong, device)
