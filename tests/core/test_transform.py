"""Transforms: inner products stay, `back` inverts, Hadamard matrices are Hadamard matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import QuantError
from qatlas.core.transform import Chain, Hadamard, Permute, Smooth, Transform, hadamard, odd_order

TRANSFORMS = [
    Hadamard(), Hadamard(seed=3), Hadamard(block=4), Hadamard(block=12, seed=1), Smooth(), Smooth(0.0), Smooth(1.0), Permute(), Chain(),
    Chain((Smooth(), Permute(), Hadamard(seed=2))), Chain((Permute(), Hadamard(block=4), Smooth(0.7))), Chain((Hadamard(), Chain((Permute(),)))),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_inner_products_stay_and_back_inverts(transform: Transform, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, 3, 24, generator=random, dtype=torch.float64), torch.randn(5, 24, generator=random, dtype=torch.float64)
    maps = transform.build(w, x.abs().amax((0, 1)))
    torch.testing.assert_close(maps.of_input(x) @ maps.of_weight(w).T, x @ w.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(maps.back(maps.of_weight(w)), w, rtol=1e-10, atol=1e-10)
    assert transform.needs_peak == ("Smooth" in str(transform) or "Permute" in str(transform))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 12, 20, 28, 36, 24, 40, 56, 72, 44, 60, 76, 108, 140])
def test_hadamard_is_orthogonal_and_of_one_size(n: int) -> None:
    matrix = hadamard(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(n)), rtol=1e-12, atol=0)
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hadamard(hadamard(x), transpose=True), x, rtol=1e-10, atol=1e-10)


def test_powers_of_two_are_sylvesters() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    torch.testing.assert_close(hadamard(torch.eye(16, dtype=torch.float64)), matrix / 4)


def test_hadamard_has_its_gradient() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x) and torch.autograd.gradcheck(lambda x: hadamard(x, transpose=True), x)


@pytest.mark.parametrize(("n", "order"), [(1, 1), (64, 1), (12, 12), (24, 12), (20, 20), (56, 28), (36, 36), (40, 20)])
def test_the_smallest_order_is_taken(n: int, order: int) -> None:
    assert odd_order(n) == order


@pytest.mark.parametrize("n", [3, 6, 10, 22, 92])
def test_orders_without_a_matrix_are_refused(n: int) -> None:
    with pytest.raises(QuantError, match=rf"order {n} can be made; take Hadamard\(block={n & -n}\)"):
        Hadamard().build(torch.empty(4, n))


def test_what_a_transform_needs_is_said() -> None:
    for transform in (Smooth(), Permute(), Chain((Permute(),))):
        with pytest.raises(QuantError, match=r"max\|x\|"):
            transform.build(torch.ones(2, 4))
    with pytest.raises(QuantError, match="does not divide"):
        Hadamard(block=5).build(torch.ones(2, 8))


def test_a_seed_is_a_seed_and_is_stored() -> None:
    w = torch.randn(2, 16)
    one, same, other = (Hadamard(seed=s).build(w) for s in (1, 1, 2))
    assert torch.equal(one.of_input(w), same.of_input(w)) and not torch.equal(one.of_input(w), other.of_input(w))
    assert one.state_dict()["signs"].shape == (16,)


def test_smooth_shares_the_difficulty() -> None:
    """s = max|x|^a / max|w|^(1-a) (SmoothQuant): with a = 0.5 both sides end with the same maxima, with 1 the input's are all 1."""
    w, peak = torch.tensor([[1.0, 4.0], [-2.0, 1.0]]), torch.tensor([8.0, 1.0])
    maps = Smooth(0.5).build(w, peak)
    torch.testing.assert_close(maps.of_input(peak[None])[0], maps.of_weight(w).abs().amax(0))
    torch.testing.assert_close(Smooth(1.0).build(w, peak).of_input(peak[None]), torch.ones(1, 2))
    assert Smooth().build(torch.zeros(2, 2), torch.zeros(2)).of_weight(torch.zeros(2, 2)).isfinite().all()


def test_permute_puts_the_heavy_channels_first() -> None:
    maps = Permute().build(torch.ones(1, 3), torch.tensor([1.0, 9.0, 5.0]))
    assert maps.of_input(torch.tensor([1.0, 9.0, 5.0])).tolist() == [9, 5, 1]
