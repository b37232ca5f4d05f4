"""Tables as grids; what every grid must do, test_grid.py and the laws ask of them."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.codebook import IQ4_NL, NF4, Codebook
from qatlas.core.error import QuantError
from qatlas.core.grain import Group
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax

floats = st.integers(-(2**24), 2**24).map(float)                   # whole fp32 numbers, so that every gap is exact in fp64
tables = st.lists(floats, min_size=2, max_size=40, unique=True).map(lambda t: tuple(sorted({*t, 0.0})))


@settings(max_examples=100, deadline=None)
@given(tables, st.lists(floats, min_size=1, max_size=30))
def test_the_nearest_entry_and_of_two_the_upper(table: tuple[float, ...], u: list[float]) -> None:
    grid = Codebook(table)
    values = torch.tensor(table, dtype=torch.float64)
    middles = ((values[1:] + values[:-1]) / 2).float()              # rounded to fp32: mostly just beside a tie, sometimes on it
    places = torch.cat([torch.tensor(u), middles])
    gaps = (values - places.double()[:, None]).abs()                # exact: both are fp32 numbers
    nearest = len(table) - 1 - gaps.flip(-1).argmin(-1)             # of equal gaps the last
    assert torch.equal(grid.encode(grid.snap(places)).long(), nearest)
    assert torch.equal(grid.snap(places), values[nearest].float())


def test_ties_go_up() -> None:
    assert IQ4_NL.snap(torch.tensor([-115.5, -4.5, 7.0, 101.0, 100.99])).tolist() == [-104, 1, 13, 113, 89]
    assert Codebook((-1, 0, 1)).snap(torch.tensor([-0.5, 0.5])).tolist() == [0, 1]


def test_the_tables_are_the_known_ones() -> None:
    assert IQ4_NL.table == tuple(float(value) for value in gguf.quants.IQ4_NL.kvalues) and IQ4_NL.bits == 4
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])           # QLoRA: 8 levels above zero, 7 below, and zero
    lower = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    made = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    assert torch.allclose(torch.tensor(NF4.table, dtype=torch.float64), made / made.abs().max(), atol=1e-6)


@pytest.mark.parametrize("grid", [IQ4_NL, NF4, Codebook((0, 1, 5))])
def test_to_json_and_back(grid: Codebook) -> None:
    assert from_json(grid.to_json()) == grid and hash(from_json(grid.to_json())) == hash(grid)
    assert Codebook((-1, 0.1)) == Codebook((-1.0, torch.tensor(0.1).item()))     # kept as fp32 numbers
    with torch.device("meta"):                                    # as while a saved model is being rebuilt
        assert from_json(grid.to_json()) == grid
    assert Codebook((-0.0, 1)).table == (0.0, 1.0)


def test_codes_are_the_index_in_small_and_large_types() -> None:
    assert IQ4_NL.encode(IQ4_NL.values()).tolist() == list(range(16))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        v = NF4.snap(torch.linspace(-1.2, 1.2, 101).to(dtype))
        assert v.dtype == dtype and torch.equal(NF4.decode(NF4.encode(v), dtype), v)


def test_a_scale_lays_the_largest_on_the_high_end() -> None:
    stored = Quant(IQ4_NL, Group(4), AbsMax()).quantize(torch.tensor([[1.13, 0.0, -1.13, 0.13]]))
    assert stored.codes.tolist() == [[15, 8, 1, 9]]               # 0 is no value: the nearest is 1
    assert torch.allclose(stored.dequantize(), torch.tensor([[1.13, 0.01, -1.04, 0.13]]))


@pytest.mark.parametrize(("table", "says"), [((1.0,), "2 to 256"), (tuple(range(257)), "2 to 256"), ((0, 1, 1), "ascend"), ((1, 0), "ascend"),
                                             ((0, 1, float("inf")), "finite"), ((0, float("nan")), "finite"), ((0, 1, 1 + 1e-12), "in fp32"),
                                             ((1, 2), "around zero"), ((-2, -1), "around zero"), (("a", 1), "numbers"), (3, "numbers")])
def test_refused_tables(table: object, says: str) -> None:
    with pytest.raises(QuantError, match=says):
        Codebook(table)  # type: ignore[arg-type]
