"""Grids: snapping, coding, ends, ties, zeros, infinities; over every grid of the bench, and each one by its own definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.codebook import IQ4_NL, NF4, Codebook
from qatlas.core.error import QuantError
from qatlas.core.floats import Float
from qatlas.core.grid import Grid, HalfStep, Sign, Stretched, Ternary, Uniform

GRIDS = [
    *(Uniform(b) for b in range(1, 9)), *(Uniform(b, False) for b in range(1, 9)), *(Uniform(b, narrow=True) for b in range(2, 9)),
    Uniform(12), Uniform(16),
    *(HalfStep(b) for b in range(1, 9)), *(Stretched(n) for n in (2, 3, 4, 5, 8, 15, 16)), Ternary(), Ternary(0.7), Sign(),
    Float(2, 1), Float(3, 2), Float(2, 3), Float(4, 3), Float(5, 2), Float(1, 2),
    IQ4_NL, NF4, Codebook((-1.0, -0.9, 0.0, 0.1, 7.0)), Codebook((-2.0, 0.0)), Codebook(tuple(i / 7 for i in range(256))),
]
every = pytest.mark.parametrize("grid", GRIDS, ids=str)
numbers = st.lists(st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32), min_size=1, max_size=20)


@every
@settings(max_examples=25, deadline=None)
@given(numbers)
def test_snap_gives_values_and_codes_them(grid: Grid, u: list[float]) -> None:
    v = grid.snap(torch.tensor(u))
    codes = grid.encode(v)
    assert torch.equal(grid.snap(v), v)
    assert torch.equal(grid.decode(codes), v)
    assert (codes >= 0).all() and (codes.int() < 2**grid.bits).all()
    assert (v >= grid.low).all() and (v <= grid.high).all()
    assert torch.isin(v, grid.values()).all()
    assert not (torch.signbit(v) & (v == 0)).any()                # negative zero is never a value


@every
def test_snapping_twice_is_snapping_once(grid: Grid) -> None:
    values = grid.values()
    assert torch.equal(grid.snap(values), values)
    double = grid.decode(grid.encode(values), torch.float64)
    assert torch.equal(grid.snap(double), double)


@every
def test_values_are_ascending_and_fit_the_bits(grid: Grid) -> None:
    values = grid.values()
    assert len(values) == grid.count <= 2**grid.bits
    assert (values.diff() > 0).all()
    assert values[0] == grid.low and values[-1] == grid.high
    assert torch.equal(grid.decode(grid.encode(values)), values)
    assert grid.encode(values).dtype == (torch.uint8 if grid.bits <= 8 else torch.int32)


@every
def test_ends_and_not_a_number(grid: Grid) -> None:
    v = grid.snap(torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30]))
    assert v[0] == v[3] == grid.high and v[1] == v[4] == grid.low
    assert v[2].isnan()


@every
@settings(max_examples=25, deadline=None)
@given(numbers)
def test_snap_is_the_nearest_value(grid: Grid, u: list[float]) -> None:
    if isinstance(grid, Ternary) and grid.threshold != 0.5:
        pytest.skip("a threshold of one's own is not the nearest value")
    if isinstance(grid, Sign):
        u = [x for x in u if x] or [1.0]
    places, values = torch.tensor(u, dtype=torch.float64), grid.decode(grid.encode(grid.values()), torch.float64)
    if isinstance(grid, Stretched):                                # its clip of 0.99 only keeps the last bin
        places = places.clamp(-1, 1)
    gap = (grid.snap(places) - places).abs()
    least = (values[:, None] - places).abs().amin(0)
    assert (gap <= least * (1 + 1e-9) + 1e-9).all()


@every
def test_inside_is_the_reach(grid: Grid) -> None:
    low, high = grid.reach
    u = torch.tensor([low, high, low - 0.01, high + 0.01], dtype=torch.float64)
    assert grid.inside(u).tolist() == [True, True, False, False]
    assert grid.inside(u, 0.25).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@every
def test_snap_keeps_the_type(grid: Grid, dtype: torch.dtype) -> None:
    if torch.finfo(dtype).max < grid.high:
        pytest.skip("the grid is larger than the type")
    assert grid.snap(torch.tensor([0.3, -0.7], dtype=dtype)).dtype == dtype


def test_ties_go_to_the_even_integer() -> None:
    u = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert Uniform(4).snap(u).tolist() == [-2, 0, 0, 2, 2]
    assert HalfStep(3).snap(torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist() == [-1.5, 0.5, 0.5, 2.5]
    assert Ternary().snap(torch.tensor([-0.5, 0.5, 0.51])).tolist() == [0, 0, 1]
    assert Ternary(0.7).snap(torch.tensor([0.7, 0.71, -0.71])).tolist() == [0, 1, -1]
    assert Sign().snap(torch.tensor([0.0, -0.0, -1e-30])).tolist() == [1, 1, -1]
    assert Float(2, 1).snap(torch.tensor([0.25, 0.75, 1.25, 2.5, 5.0, -5.0])).tolist() == [0, 1, 1, 2, 4, -4]


def test_uniform_is_the_integers() -> None:
    assert Uniform(3).values().tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert Uniform(3, narrow=True).values().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert Uniform(2, False).values().tolist() == [0, 1, 2, 3]
    assert Uniform(3).encode(torch.tensor([-4.0, 0.0, 3.0])).tolist() == [0, 4, 7]
    assert Uniform(3, narrow=True).encode(torch.tensor([-3.0, 0.0])).tolist() == [1, 4]      # the code of the full grid


@pytest.mark.parametrize("bits", [0, 17, 1.58, True and 2.0])
def test_uniform_refuses_other_bits(bits: float) -> None:
    with pytest.raises(QuantError, match=r"Ternary\(\)"):
        Uniform(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(("grid", "top"), [(Uniform(4), 7), (Uniform(4, False), 15), (Uniform(1), 1), (Ternary(), 1), (Sign(), 1), (HalfStep(2), 2),
                                           (Stretched(3), 1), (Stretched(4), 1), (Stretched(8), 3), (Stretched(16), 7)])
def test_qp_of_the_gradient_factor(grid: Grid, top: int) -> None:
    assert grid.top == top


def test_stretched_halves_an_interval() -> None:
    assert Stretched(4).values().tolist() == [-0.75, -0.25, 0.25, 0.75]
    with pytest.raises(QuantError):
        Stretched(1)
    with pytest.raises(QuantError, match="never reaches its last level"):
        Stretched(256)
    with pytest.raises(QuantError, match="between"):
        Stretched(4, clip=1.0)


@pytest.mark.parametrize(("grid", "kind"), [(Float(4, 3), torch.float8_e4m3fn)])
def test_float_is_the_type_of_torch(grid: Float, kind: torch.dtype) -> None:
    """E4M3 against torch's own type: each of its 256 codes, and the rounding of many numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(kind).float()
    good = theirs.isfinite()
    assert torch.equal(grid.decode(codes)[good], theirs[good] + 0.0)
    u = torch.linspace(-500, 500, 20011)
    assert torch.equal(grid.snap(u), u.clamp(-448, 448).to(kind).float() + 0.0)
    small = torch.linspace(-0.05, 0.05, 4001)
    assert torch.equal(grid.snap(small), small.to(kind).float() + 0.0)


def test_float_values_by_their_definition() -> None:
    for e, m in itertools.product((1, 2, 3), (0, 1, 2)):
        bias = 2 ** (e - 1) - 1
        positive = {f / 2**m * 2.0 ** (1 - bias) for f in range(2**m)}
        positive |= {(1 + f / 2**m) * 2.0 ** (field - bias) for field in range(1, 2**e) for f in range(2**m)}
        assert Float(e, m).values().tolist() == sorted(positive | {-p for p in positive})
