"""The laws of the house, over every part that exists, found by listing (tests/parts.py): a new part pays no row and receives the whole suite.

    1   q(x) == q.quantize(x).dequantize(), bit for bit
    2   a grid: snapping twice is snapping once, decode(encode(v)) == v, at most 2^bits values; ties, ends, zeros, infinities
    3   a transform keeps inner products, and `back` inverts it
    10  every gradient is its closed form in float64 (the golden vectors of the authors: tests/test_golden.py)

Laws 4 to 9, 11 and 12 speak of layers, models, formats and runs; each has its section below and is filled where its floor is written.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import every
from torch import Tensor

from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip, Estimator, Ste
from qatlas.core.grain import Grain, PerChannel, PerTensor, PerToken
from qatlas.core.grid import Grid, HalfStep, Sign, Ternary, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned, MinMax, Scale
from qatlas.core.transform import Transform

GRIDS, GRAINS, SCALES, ESTIMATORS, TRANSFORMS = (every(kind) for kind in (Grid, Grain, Scale, Estimator, Transform))
seeds = st.integers(0, 2**31)
few = settings(max_examples=5, deadline=None)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers with what goes wrong among them: a row of zeros, a constant row, an outlier, very small ones."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x[0], x[1], x[2], x[-1] = 0, 0.3, 1e-30, x[-1] * 100
    return x


def ready(quant: Quant, x: Tensor) -> Quantizer:
    quantizer = Quantizer(quant)
    return quantizer if quantizer.ready else quantizer.initialise(x)


def fits(quant: Quant) -> bool:
    """A kept scale has no meaning per token, a zero none off the integers."""
    return not (quant.scale.keeps != "nothing" and isinstance(quant.grain, PerToken))


# ---- law 1: what is computed with, what is stored --------------------------------------------------------------------------------------------------

PAIRS = [Quant(grid, grain, AbsMax()) for grid in GRIDS for grain in GRAINS] \
    + [Quant(grid, PerChannel(), scale, refit=refit) for grid in (Uniform(4), Uniform(3, False), HalfStep(2), Ternary(), Sign()) for scale in SCALES
       for refit in (False, True)] \
    + [Quant(Uniform(4, False), grain, start) for grain in GRAINS
       for start in (MinMax(), MinMax("offset"), Learned(MinMax()), Learned(MinMax("offset")))]


@pytest.mark.parametrize("quant", [q for q in PAIRS if fits(q)], ids=str)
@few
@given(seeds)
def test_law_1_forward_is_what_is_stored(quant: Quant, seed: int) -> None:
    x = draw(seed, 8, 32)
    quantizer = ready(quant, x).eval()
    y, stored = quantizer(x), quantizer.quantize(x)
    assert torch.equal(y, stored.dequantize()) and torch.equal(y, quantizer.hard(x))
    assert y.isfinite().all()
    assert torch.equal(quant.hard(x), quant.quantize(x).dequantize())
    assert stored.codes.shape == x.shape and (stored.codes.int() < 2**quant.bits).all()


@pytest.mark.parametrize("quant", [Quant(grid, grain) for grid in (Uniform(4), Ternary(), Sign()) for grain in GRAINS], ids=str)
def test_law_1_in_training_and_with_a_shift(quant: Quant) -> None:
    x, shift = draw(0, 8, 32), draw(1, 8, 32).clamp(-1, 1)
    quantizer = ready(quant, x)
    assert torch.equal(quantizer(x, shift), quantizer.quantize(x, shift).dequantize())
    assert torch.equal(quantizer(x.requires_grad_()), quantizer.quantize(x).dequantize())


# ---- law 2: grids ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=30))
def test_law_2_a_grid(grid: Grid, u: list[float]) -> None:
    v = grid.snap(torch.tensor(u))
    assert torch.equal(grid.snap(v), v)
    codes = grid.encode(v)
    assert torch.equal(grid.decode(codes), v) and (codes.int() >= 0).all() and (codes.int() < 2**grid.bits).all()
    assert (grid.low <= v).all() and (v <= grid.high).all()
    assert torch.equal(grid.snap(torch.tensor(u).sort().values), v.sort().values)       # never falls as u rises
    for margin in (0.0, 0.25, 0.5):
        assert torch.equal(grid.passes(v, torch.tensor(u), margin), v * grid.inside(torch.tensor(u), margin))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_law_2_values_ends_zeros_infinities(grid: Grid) -> None:
    values = grid.values()
    assert len(values) == grid.count <= 2**grid.bits and (values.diff() > 0).all()
    assert values[0] == grid.low and values[-1] == grid.high and grid.inside(values).all()
    assert torch.equal(grid.snap(values), values)
    v = grid.snap(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0]))
    assert v[0] == grid.high and v[1] == grid.low and v[2].isnan() and v[3] == v[4]
    assert not (torch.signbit(v[3:]) & (v[3:] == 0)).any()


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("shape", [(8, 32), (8, 4, 8), (8, 2, 4, 4), (16, 96)])
def test_law_2_a_grain_loses_nothing(grain: Grain, shape: tuple[int, ...]) -> None:
    x = draw(1, *shape)
    view = grain.view(x)
    assert torch.equal(grain.back(view, x.shape), x) and grain.scale_shape(shape) == tuple(view.shape[:-1])


# ---- law 3: transforms -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("n", [16, 12, 24])
def test_law_3_inner_products_stay(transform: Transform, n: int) -> None:
    x, w = draw(0, 7, n, dtype=torch.float64), draw(1, 5, n, dtype=torch.float64)
    maps = transform.build(w, x.abs().amax(0))
    torch.testing.assert_close(maps.of_input(x) @ maps.of_weight(w).T, x @ w.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(maps.back(maps.of_weight(w)), w, rtol=1e-9, atol=1e-9)


# ---- law 10: gradients -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_law_10_x_hears_the_estimator_and_nothing_else(grid: Grid, estimator: Estimator) -> None:
    x, g = draw(0, 8, 32, dtype=torch.float64).requires_grad_(), draw(1, 8, 32, dtype=torch.float64)
    quant = Quant(grid, PerChannel(), AbsMax(floor=1e-3), estimator)
    Quantizer(quant)(x).backward(g)
    s = quant.scale.cast(quant.scale.measure(x.detach(), grid).s)
    u = x.detach() / s
    assert torch.equal(x.grad, estimator(g, u, grid.snap(u), grid)) and x.grad.isfinite().all()
    assert torch.equal(estimator(0 * g, u, grid.snap(u), grid), 0 * g)                   # linear where it must be: no gradient in, none out


LEARNED = [Learned(factor=factor, margin=margin, gradient=rule, over=over)
           for factor in ("lsq", 0.5) for margin in (0.0, 0.5) for rule in ("clipped", "value") for over in ("scale", "tensor")]


@pytest.mark.parametrize("scale", LEARNED, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_law_10_a_learned_step_hears_its_declared_rule(grid: Grid, scale: Learned) -> None:
    x, g = draw(0, 4, 16, dtype=torch.float64), draw(1, 4, 16, dtype=torch.float64)
    quantizer = ready(Quant(grid, PerTensor(), scale, Clip()), x)
    quantizer(x).backward(g)
    s = quantizer.scale.detach().double()
    wanted = 0.0
    low, high = grid.reach
    for value, slope in zip(x.flatten().tolist(), g.flatten().tolist(), strict=True):
        u = torch.tensor(value, dtype=torch.float64) / s
        v, place = grid.snap(u).item(), u.item()
        if isinstance(grid, Uniform) and scale.margin == 0.5:
            inside = grid.low <= round(place) <= grid.high
        else:
            inside = low - scale.margin <= place <= high + scale.margin
        wanted += slope * (v - place if inside and scale.gradient == "clipped" else v)
    wanted *= 0.5 if scale.factor == 0.5 else 1 / math.sqrt(64 * grid.top)
    assert quantizer.scale.grad.item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)      # the master, and so its gradient, is fp32


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_law_10_a_recomputed_scale_is_deaf_unless_it_says_otherwise(scale: Scale) -> None:
    if scale.keeps != "nothing":
        pytest.skip("kept")
    x, g = draw(0, 8, 32, dtype=torch.float64), draw(1, 8, 32, dtype=torch.float64)
    grads = []
    for rule in ("none", "statistic"):
        leaf = x.clone().requires_grad_()
        Quantizer(Quant(Uniform(4), PerChannel(), scale.but(gradient=rule), Ste()))(leaf).backward(g)
        assert leaf.grad.isfinite().all()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], g)
    if type(scale).__name__ != "MseSearch":
        assert not torch.equal(grads[1], g)


def test_errors_name_what_to_write() -> None:
    for grain in GRAINS:
        try:
            grain.view(torch.empty(3, 7))
        except QuantError as error:
            assert "(3, 7)" in str(error)


def test_the_lists_hold_what_they_should() -> None:
    """Listing finds the parts; an empty list would pass every law."""
    def names(parts: list[Any]) -> set[str]:
        return {type(part).__name__ for part in parts}
    assert {"Uniform", "HalfStep", "Stretched", "Ternary", "Sign", "Float"} <= names(GRIDS)
    assert {"PerTensor", "PerChannel", "PerToken", "Group", "Block"} <= names(GRAINS)
    assert {"AbsMax", "MinMax", "AbsMean", "Rms", "Percentile", "MseSearch", "Moving", "Learned"} <= names(SCALES)
    assert {"Ste", "Clip", "Trust"} <= names(ESTIMATORS) and {"Hadamard", "Smooth", "Permute", "Chain"} <= names(TRANSFORMS)
