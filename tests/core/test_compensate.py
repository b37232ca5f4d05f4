"""GPTQ's column update against the formula it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.compensate import Hessian, compensate, factor
from qatlas.core.error import QuantError

few = settings(max_examples=10, deadline=None)


def draw(seed, width=12, out=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, width, generator=g, dtype=torch.float64)
    x = x + 0.1 * x @ torch.randn(width, width, generator=g, dtype=torch.float64)      # correlated, and far from singular: digits count
    return torch.randn(out, width, generator=g, dtype=torch.float64), 2 * x.T @ x / 40


def tenth(j, column):
    return (column * 2).round() / 2


@few
@given(st.integers(0, 2**31))
def test_a_step_is_optimal_brain_surgeon(seed):
    """Behind column j the rest is what minimises e H e^T, column j being rounded and those before it fixed."""
    w, h = draw(seed)
    turned = compensate(w, factor(h, 0.0), tenth)
    done = torch.zeros_like(w)
    for j in range(12):
        rest = slice(j, 12)
        made = -torch.linalg.solve(h[rest, rest], h[rest, :j] @ done[:, :j].T).T                        # the best of the rest given the errors before
        torch.testing.assert_close(turned[:, j], (w[:, rest] + made)[:, 0])
        done[:, j] = tenth(j, turned[:, j]) - w[:, j]


@few
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 5, 12, 128]))
def test_the_size_of_blocks_says_nothing(seed, block):
    w, h = draw(seed)
    u = factor(h)
    torch.testing.assert_close(compensate(w, u, tenth, block=block), compensate(w, u, tenth, block=4))


@few
@given(st.integers(0, 2**31))
def test_the_errors_add_up_to_what_the_output_lost(seed):
    w, h = draw(seed)
    u = factor(h, 0.0)
    turned = compensate(w, u, tenth)
    rounded = torch.stack([tenth(j, turned[:, j]) for j in range(12)], 1)
    errors = (turned - rounded) / u.diagonal()
    torch.testing.assert_close(errors.square().sum(), ((w - rounded) @ h * (w - rounded)).sum())
    plain = torch.stack([tenth(j, w[:, j]) for j in range(12)], 1)
    assert errors.square().sum() <= ((w - plain) @ h * (w - plain)).sum() * 1.5


def test_with_independent_inputs_it_is_plain_rounding():
    w, _ = draw(0)
    assert torch.equal(compensate(w, factor(torch.eye(12) * 3), tenth), w)


def test_the_diagonal_is_the_cost_of_a_weight():
    """1 / U_jj^2 is 1 / [(H_j:)^-1]_jj: plain Optimal Brain Surgeon for the first column, H_jj itself for the last."""
    _, h = draw(1)
    u = factor(h, 0.0)
    torch.testing.assert_close(u[0, 0] ** 2, h.inverse()[0, 0])
    torch.testing.assert_close(u[-1, -1] ** 2, 1 / h[-1, -1])
    torch.testing.assert_close(u[4, 4] ** 2, h[4:, 4:].inverse()[0, 0])


def test_sequences_are_counted_and_a_dead_input_stands_alone():
    one, two = Hessian(3), Hessian(3)
    x = torch.randn(4, 6, 3)
    x[..., 1] = 0
    one.add(x)
    for row in x:
        two.add(row)
    torch.testing.assert_close(one.value, two.value)
    torch.testing.assert_close(one.value, 2 * torch.einsum("bti,btj->ij", x.double(), x.double()) / 4)
    u = factor(one.value)
    assert torch.isfinite(u).all() and u[0, 1] == u[1, 2] == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(QuantError, match="saw no input"):
        _ = Hessian(2).value
    with pytest.raises(QuantError, match="not positive definite"):
        factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(QuantError, match="does not belong"):
        compensate(torch.zeros(2, 3), torch.eye(2), tenth)
