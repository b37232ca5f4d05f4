"""Compiled equals eager: values bit for bit, also when kept and packed; gradients to 1e-6."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from parts import every
from torch import nn

from qatlas.core.error import QuantError
from qatlas.core.estimator import Estimator
from qatlas.core.grain import Grain, PerChannel, PerTensor, PerToken
from qatlas.core.grid import Grid, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned, MinMax, Scale
from qatlas.core.scheme import scheme
from qatlas.kernels.compiled import Compiled, check, compiled, sample
from qatlas.layers.quantized import Quantized
from qatlas.model.rules import quantize

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")


@pytest.fixture
def no_compiler(monkeypatch):
    """The formula without the compiler: what is left is ours."""
    monkeypatch.setattr("qatlas.kernels.compiled._compile", lambda function: function)


def model(text="w4a8-g32"):
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8), nn.Linear(8, 2)), text).train()


def trained(net, steps=3):
    """Losses, the last gradients and the codes of three steps."""
    x, optimizer = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), torch.optim.SGD(net.parameters(), lr=0.1)
    values, grads = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        y = net(x)
        y.square().mean().backward()
        values.append(y.detach())
        grads = {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
    return values, grads


@needs_compiler
@pytest.mark.slow
def test_a_compiled_training_is_the_eager_one():
    """One test for all that needs the compiler, which takes seconds a function: a learned scale a group, a fresh one a token, kept and not."""
    net, again = model(), model()
    for layer in again.modules():
        if isinstance(layer, Quantized):
            layer.keep = "buffer"
    with compiled(again):
        first, second = trained(net, 1), trained(again, 1)
        assert torch.equal(first[0][0], second[0][0])
        for name, wanted in first[1].items():
            torch.testing.assert_close(second[1][name], wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()), msg=name)
        for layer in again.modules():
            if isinstance(layer, Quantized):
                assert torch.equal(layer.computed(), layer.quantize().dequantize()) and torch.equal(layer.computed(), layer.hard())
    assert not any(q.formula for q in again.modules() if hasattr(q, "formula"))
    assert (sample(Quant(Uniform(4)), CPU) == 0).any()


@pytest.mark.parametrize("text", ["w4-g32", "w1.58a8", "w1", "w2a8-tensor-static"])
def test_the_formula_without_the_compiler_is_the_eager_one(text, no_compiler):
    quants = [q for q in (scheme(text).weight, scheme(text).input) if q is not None and getattr(q.grid, "signed", True) is not None]
    for quant in quants:
        check(Compiled(quant), CPU)
    one, other = model(text.removesuffix("-static")), model(text.removesuffix("-static"))
    with compiled(other):
        (values, grads), (again, found) = trained(one), trained(other)
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    for name in grads:
        torch.testing.assert_close(found[name], grads[name], rtol=1e-6, atol=1e-7)


PARTS = [Quant(grid, PerChannel(), AbsMax()) for grid in every(Grid)] + [Quant(Uniform(4), grain, Learned()) for grain in every(Grain) if
         not isinstance(grain, PerToken)] + [Quant(Uniform(4), PerChannel(), scale) for scale in every(Scale)] \
    + [Quant(Uniform(3), PerChannel(), Learned(), estimator) for estimator in every(Estimator)] \
    + [Quant(Uniform(4, False), PerChannel(), Learned(start)) for start in (MinMax(), MinMax("offset"))] \
    + [Quant(Uniform(4), PerChannel(), AbsMax(), refit=True), Quant(Uniform(4), PerChannel(), AbsMax(), clip=0.5)]


@pytest.mark.parametrize("quant", PARTS, ids=str)
def test_laws_1_and_10_of_every_part(quant, no_compiler):
    """What stands in for the formula writes the same values into what is kept, and gives the same gradients; by listing. Under QATLAS_COMPILER the
    compiler itself runs (minutes)."""
    laws(quant)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif("QATLAS_COMPILER" not in os.environ, reason="minutes; set QATLAS_COMPILER")
@pytest.mark.parametrize("quant", PARTS, ids=str)
def test_laws_1_and_10_of_every_part_compiled(quant):
    laws(quant)


def laws(quant):
    x, g = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3))
    x[0], x[1], x[2] = 0.0, 0.3, 1e-30
    eager, other = (Quantizer(quant) if quant.scale.keeps == "nothing" else Quantizer(quant).initialise(x) for _ in range(2))
    if quant.scale.nested is not None or quant.scale.offset_nested is not None:
        return
    other.formula = check(Compiled(quant), CPU)
    into = torch.full_like(x, torch.nan)
    assert other.known(x, None, into).value is into and torch.equal(into, other.quantize(x).dequantize()) and torch.equal(other.known(x).value, into)
    found = []
    for quantizer in (eager, other):
        w = x.clone().requires_grad_()
        y = quantizer(w)
        y.backward(g)
        found.append([y.detach(), w.grad, *(p.grad for p in quantizer.parameters())])
    same = 2 if quant.scale.gradient != "statistic" else 1
    assert all(torch.equal(a, b) for a, b in zip(found[0][:same], found[1][:same], strict=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))


@needs_compiler
@pytest.mark.slow
def test_gradient_and_sums_are_one_pass_and_memory_is_counted():
    """The compiler's C++ has one loop over the rows of the weight; and a write into kept memory is seen by autograd."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    quant = scheme("w4-g32").weight
    formula = Compiled(quant)
    x = torch.randn(64, 32)
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, code = run_and_get_code(formula.pull, x, x, quant.measure(x), None, 1.0)
    kernel = code[0][code[0].index("cpp_pybinding"):]
    assert kernel[: kernel.index("async_compile.wait")].count("loadu(in_ptr0") <= 2           # whole vectors, and the rest of a row
    y = torch.zeros_like(x)
    formula.values(x, quant.measure(x), None, y)
    assert y._version > 0


def test_what_does_not_agree_is_refused(monkeypatch, no_compiler):
    quant = scheme("w4-g32").weight
    wrong = Compiled(quant)
    wrong._values = lambda y, x, s, *rest: y.copy_(x.div(s).mul(1 + 1e-6).round().mul(s))  # a rounding too many, as a fused product and sum would be
    with pytest.raises(QuantError, match="other values than the eager one"):
        check(wrong, CPU)
    wrong = Compiled(quant)
    wrong._pull = lambda dx, g, *rest: [dx.copy_(g).sum(-1, keepdim=True), None, None, None]
    with pytest.raises(QuantError, match="gradients of .* differ"):
        check(wrong, CPU)

    def broken(function):
        def fail(*_):
            raise RuntimeError("no compiler was found")
        return fail

    monkeypatch.setattr("qatlas.kernels.compiled._compile", broken)
    net = model()
    with pytest.raises(QuantError, match="needs a C\\+\\+ compiler"), compiled(net):
        pass
    assert not any(q.formula for q in net.modules() if hasattr(q, "formula"))


def test_a_formula_serves_its_own_quant_only(no_compiler):
    net = model("w4")
    with compiled(net):
        net[0].weight_quantizer.quant = scheme("w2").weight
        assert net[0](torch.ones(1, 64)).isfinite().all()
        assert torch.equal(net[0].computed(), net[0].hard()) and net[0].quantize().bits == 2
        assert torch.equal(net[0].computed(), net[0].quantize().dequantize())


def test_what_stays_eager_is_said(no_compiler):
    nested = Quant(Uniform(4), PerTensor(), AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax())))
    holder = nn.Module()
    holder.quantizer = nested.build()
    with pytest.warns(UserWarning, match="1 of 1 quantizers"), compiled(holder):
        assert holder.quantizer.formula is None


def test_each_quant_is_compiled_once(no_compiler, monkeypatch):
    made = []
    monkeypatch.setattr("qatlas.kernels.compiled.check", lambda formula, device: made.append(formula) or formula)
    with compiled(model()) as net:
        formulas = {id(q.formula) for q in net.modules() if hasattr(q, "formula")}
    assert len(made) == len(formulas) == 2


def test_a_second_derivative_takes_the_eager_lines(no_compiler):
    """A compiled backward has none: with a pull that is cut off from the graph, as the compiler's is, the second derivative is that of eager."""
    found, quant = [], model("w3")[0].weight_quantizer.quant
    for formula in (None, SimpleNamespace(quant=quant, values=Compiled(quant).values, pull=lambda *given: tuple(torch.zeros(()) for _ in range(5)))):
        net = model("w3")
        net[0].weight_quantizer.formula = formula
        weight, x = net[0].weight, torch.ones(4, 64)
        (g,) = torch.autograd.grad(net(x).square().sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(g.sum(), weight, create_graph=True)[0])
    assert torch.equal(*found) and found[0].abs().sum() > 0
