"""Schedules are pure functions of progress."""

import pytest

from qatlas.core.noun import from_json
from qatlas.train.schedule import constant, cosine, linear


@pytest.mark.parametrize("make", [cosine, linear])
def test_ends_and_middle(make):
    assert make()(0.0) == 1.0 and make()(1.0) == pytest.approx(0.0, abs=1e-12) and make()(0.5) == pytest.approx(0.5)
    assert make(0.2, 0.1)(0.1) == pytest.approx(0.5) and make(0.2, 0.1)(0.2) == pytest.approx(1.0) and make(0.2, 0.1)(1.0) == pytest.approx(0.1)
    assert make(1.0)(0.5) == 0.5
    assert all(a >= b for a, b in zip([make()(i / 50) for i in range(50)], [make()(i / 50) for i in range(1, 51)], strict=True))
    assert from_json(make(0.1).to_json()) == make(0.1)


def test_constant():
    assert constant()(0.0) == constant()(0.99) == 1.0 and constant(0.5)(0.25) == 0.5
