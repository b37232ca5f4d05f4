"""The gate is `g * ((u >= low) & (u <= high))`, to the last number beside each end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatlas.core.gate import between, gate

ENDS = st.sampled_from([-128.0, -8.5, -8.0, -1.5, -1.0, -0.75, 0.0, 0.5, 0.99609375, 1.0, 2.0, 7.0, 7.5, 255.0])


def beside(end: float, dtype: torch.dtype) -> torch.Tensor:
    """The end and its neighbours in the type."""
    x = torch.tensor(end, dtype=dtype)
    up, down = torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)
    return torch.stack([torch.nextafter(x, down), x, torch.nextafter(x, up)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(low=ENDS, high=ENDS)
def test_a_gate_is_its_formula(low, high, dtype):
    u = torch.cat([beside(low, dtype), beside(high, dtype), torch.tensor([-math.inf, 0.3, math.inf], dtype=dtype)])
    g = torch.arange(1, len(u) + 1, dtype=dtype)
    assert torch.equal(gate(g, u, low, high), g * ((u >= low) & (u <= high)))
    assert torch.equal(between(g, u, low, high), g * ((u > low) & (u < high)))


def test_a_gate_has_a_derivative():
    g = torch.tensor([1.0, 2.0], requires_grad=True)
    gate(g * g, torch.tensor([0.0, 2.0]), -1, 1).sum().backward()
    assert g.grad.tolist() == [2, 0]


def test_a_compiled_gate_is_the_same():
    u = torch.cat([beside(-8.0, torch.float32), beside(7.0, torch.float32)])
    g = torch.arange(1.0, 7)
    assert torch.equal(torch.compile(gate, backend="eager", fullgraph=True)(g, u, -8, 7), gate(g, u, -8, 7))
