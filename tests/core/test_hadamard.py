"""Hadamard matrices are Hadamard matrices, and the transform is a product with one."""

from __future__ import annotations

import math

import pytest
import torch

from qatlas.core.hadamard import hadamard, odd_order


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 64, 128, 512, 12, 20, 28, 36, 24, 40, 56, 72, 44, 60, 76, 108, 140])
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


def test_autocast_does_not_reach_it() -> None:
    """A master rotated in bf16 would be off by a hundredth of its size."""
    x = torch.randn(8, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = hadamard(x)
    assert torch.equal(y, hadamard(x)) and y.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 32), (16,), (3, 1), (5, 12)])
def test_of_any_shape(shape: tuple[int, ...]) -> None:
    assert hadamard(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("n", [64, 128, 1024, 24])
def test_rows_do_not_depend_on_those_beside_them(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors go through in parts, also strided ones: the same bits."""
    x = torch.randn(n, 37).T
    whole = hadamard(x)
    monkeypatch.setattr("qatlas.core.hadamard.CHUNK", 5 * n)
    assert torch.equal(hadamard(x), whole) and torch.equal(hadamard(x[:3]), whole[:3])
    torch.testing.assert_close(hadamard(whole, transpose=True), x)
