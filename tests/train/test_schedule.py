"""Schedules are pure functions of progress."""

import pytest

from qatlas.core.error import RunError
from qatlas.core.noun import from_json
from qatlas.train.schedule import constant, cosine, linear, two_stage


@pytest.mark.parametrize("make", [cosine, linear])
def test_ends_and_middle(make):
    assert make()(0.0) == 1.0 and make()(1.0) == pytest.approx(0.0, abs=1e-12) and make()(0.5) == pytest.approx(0.5)
    assert make(0.2, 0.1)(0.1) == pytest.approx(0.5) and make(0.2, 0.1)(0.2) == pytest.approx(1.0) and make(0.2, 0.1)(1.0) == pytest.approx(0.1)
    assert make(1.0)(0.5) == 0.5
    assert all(a >= b for a, b in zip([make()(i / 50) for i in range(50)], [make()(i / 50) for i in range(1, 51)], strict=True))
    assert from_json(make(0.1).to_json()) == make(0.1)


def test_constant():
    assert constant()(0.0) == constant()(0.99) == 1.0 and constant(0.5)(0.25) == 0.5


def test_two_stages_are_one_line_with_a_drop():
    make, line = two_stage(0.1, at=0.4, second=0.5), linear(0.1)
    assert make(0.05) == line(0.05) == 0.5 and make(0.39) == line(0.39) and make(0.4) == line(0.4) / 2 and make(0.9) == line(0.9) / 2
    assert two_stage(second=1.0)(0.7) == linear()(0.7)
    assert from_json(make.to_json()) == make
    for wrong in ({"at": 1.5}, {"second": 0.0}):
        with pytest.raises(RunError, match="drop"):
            two_stage(**wrong)
