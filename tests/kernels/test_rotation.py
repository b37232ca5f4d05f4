"""The kernel's rotation is core's up to the order of sums, its own inverse, its own gradient, seen by compilers; what it cannot do is core's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatlas.core.hadamard import hadamard
from qatlas.core.transform import Chain, Hadamard, Permute
from qatlas.kernels import library, rotation
from qatlas.kernels.rotation import quick, turn, turned
from qatlas.model.rules import Rule, quantize

native = pytest.mark.skipif(library.library() is None, reason="the CPU kernels are not built")


@pytest.mark.parametrize("block", [2, 8, 32, 128, 1024, 4096])
def test_it_is_cores_matrix(block: int) -> None:
    x = torch.randn(5, 3, block, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned(x), hadamard(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned(turned(x)), x, rtol=1e-5, atol=1e-5)


@native
def test_gradients_of_first_and_second_order() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (ours,) = torch.autograd.grad(turned(x).pow(3).sum(), x, create_graph=True)
    (theirs,) = torch.autograd.grad(hadamard(x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), x)[0], torch.autograd.grad(theirs.square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@native
def test_the_operator_is_one() -> None:
    torch.library.opcheck(turn, (torch.randn(3, 8, requires_grad=True), 8))
    torch.library.opcheck(turn, (torch.randn(8, 3).T, 8))


@native
def test_a_strided_input_is_not_written() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).T
    before = x.clone()
    torch.testing.assert_close(turned(x), hadamard(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("x", [torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8).bfloat16(), torch.randn(2, 12), torch.randn(2, 8192),
                               torch.randn(2, 1)])
def test_what_it_cannot_do_is_cores(x: torch.Tensor) -> None:
    assert turned(x).dtype == x.dtype
    assert torch.equal(turned(x), hadamard(x))


def test_without_the_library_it_is_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation.library, "library", lambda: None)
    x = torch.randn(2, 8)
    assert torch.equal(turned(x), hadamard(x))


def test_layers_take_it_alone_and_in_a_chain() -> None:
    for spec in (Hadamard(most=8), Chain((Permute(), Hadamard(most=8)))):
        maps = quick(spec.build(torch.randn(4, 24), torch.rand(24)))
        assert [part.turn for part in maps.modules() if hasattr(part, "turn")] == [turned]
    model = quantize(nn.Sequential(nn.Linear(24, 4)), [Rule("*", transform=Hadamard(most=8))])
    assert model[0].transform.turn is turned
