"""Estimators and Snap: the gradient of x by closed form, one thing at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.estimator import Clip, Estimator, Snap, Ste, Trust
from qatlas.core.grain import PerTensor
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMean, Learned

seeds = st.integers(0, 2**31)


def draw(seed: int, n: int = 40, times: float = 3.0) -> torch.Tensor:
    return times * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_estimators_are_their_formulas(seed: int) -> None:
    g, u, grid = draw(seed), draw(seed + 1), Uniform(3)
    v = grid.snap(u)
    rows = list(zip(g.tolist(), u.tolist(), v.tolist(), strict=True))
    assert torch.equal(Ste()(g, u, v, grid), g)
    assert Clip()(g, u, v, grid).tolist() == [a if -4 <= b <= 3 else 0 for a, b, _ in rows]
    assert Clip(0.25)(g, u, v, grid).tolist() == [a if -4.25 <= b <= 3.25 else 0 for a, b, _ in rows]
    assert Clip(at=0.99)(g, u, v, grid).tolist() == [a if abs(b) <= 0.99 else 0 for a, b, _ in rows]
    assert Trust(0.3)(g, u, v, grid).tolist() == [a if abs(b - c) <= 0.3 else 0 for a, b, c in rows]


@pytest.mark.parametrize("estimator", [Ste(), Clip(), Clip(0.5), Trust()])
@pytest.mark.parametrize("grid", [Uniform(3), HalfStep(2), Ternary(), Sign()], ids=str)
def test_snap_hands_the_estimator_its_place(grid: object, estimator: Estimator) -> None:
    x = draw(5).requires_grad_()
    g = draw(6)
    quant = Quant(grid, PerTensor(), AbsMean(), estimator)  # type: ignore[arg-type]
    Quantizer(quant)(x).backward(g)
    u = x.detach() / x.detach().abs().mean()
    assert torch.equal(x.grad, estimator(g, u, quant.grid.snap(u), quant.grid))


def test_the_scale_never_hears_the_estimator() -> None:
    grads = []
    for estimator in (Ste(), Clip(), Trust(0.1)):
        quantizer = Quantizer(Quant(Uniform(3), PerTensor(), Learned(), estimator)).initialise(draw(1))
        x = draw(2).float()
        quantizer(x).sum().backward()
        grads.append(quantizer.scale.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_a_shift_moves_the_place_and_hears_s_times_dx(seed: int) -> None:
    """y = s snap(x / s + shift): the adapter inside the grid of LR-QAT."""
    x, shift, g = draw(seed).requires_grad_(), draw(seed + 1, times=0.5).requires_grad_(), draw(seed + 2)
    quant = Quant(Uniform(3), PerTensor(), AbsMean(), Clip())
    y = Quantizer(quant)(x, shift)
    y.backward(g)
    s = x.detach().abs().mean()
    u = x.detach() / s + shift.detach()
    torch.testing.assert_close(y.detach(), s * u.round().clamp(-4, 3), rtol=1e-12, atol=0)
    wanted = g * ((u >= -4) & (u <= 3))
    assert torch.equal(x.grad, wanted)
    torch.testing.assert_close(shift.grad, wanted * s, rtol=1e-12, atol=0)


def test_a_second_derivative_exists() -> None:
    """The gradient is linear in g, and Snap's backward is made of differentiable operations: Hessian-vector products run."""
    x = draw(3, 12, 1.0).requires_grad_()
    quantizer = Quantizer(Quant(Uniform(3), PerTensor(), Learned(), Clip())).initialise(draw(4))
    y = quantizer(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = quantizer.quant.grid.inside(x.detach() / quantizer.scale.detach())
    torch.testing.assert_close(first.detach(), 2 * y.detach() * inside)
    torch.testing.assert_close(second, 2.0 * inside.double())
    (of_scale,) = torch.autograd.grad(quantizer(x).square().sum(), quantizer.scale, create_graph=True)
    (again,) = torch.autograd.grad(of_scale.sum(), quantizer.scale)
    assert again.isfinite().all()


def test_only_what_needs_a_gradient_gets_one() -> None:
    quantizer = Quantizer(Quant(Uniform(3), PerTensor(), Learned(), Clip())).initialise(draw(4))
    quantizer.scale.requires_grad_(False)
    x = draw(1).float().requires_grad_()
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is None and x.grad is not None


def test_snap_saves_x_and_scales_only() -> None:
    saved: list[torch.Tensor] = []
    x = draw(1, 1000).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Quantizer(Quant(Uniform(4), PerTensor(), AbsMean()))(x)
    assert sum(t.numel() for t in saved) <= x.numel() + 1
    assert Snap.__name__ == "Snap"
