"""The kernel's codes and steps are those of the quantizer, bit for bit; what it does not make it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qatlas.core.grain import PerChannel, PerToken
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.kernels.library import library
from qatlas.kernels.tokens import tokens, why_not

native = pytest.mark.skipif(library() is None, reason="the CPU kernels are not built")
QUANTS = [Quant(Uniform(8), PerToken()), Quant(Uniform(8, narrow=True), PerToken()), Quant(Uniform(4), PerToken()), Quant(Uniform(2), PerToken()),
          Quant(Uniform(8), PerToken(), AbsMax(reach=100.0)), Quant(Uniform(8), PerToken(), AbsMax(floor=1e-3))]


def same(x: torch.Tensor, quant: Quant) -> None:
    codes, steps = tokens(x, quant)
    q = quant.build().quantize(x)
    assert torch.equal(codes.int(), q.codes.int() - 2 ** (quant.bits - 1)) and torch.equal(steps, q.steps)


@native
@pytest.mark.parametrize("quant", QUANTS, ids=str)
@settings(max_examples=60, deadline=None)
@given(x=arrays("float32", st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_any_numbers(quant: Quant, x: object) -> None:
    same(torch.from_numpy(x), quant)  # type: ignore[arg-type]


@native
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_ties_zeros_and_many_tokens(quant: Quant) -> None:
    ties = torch.arange(-254.0, 255) / 2
    same(torch.cat([ties, ties.new_tensor([127.0])]).repeat(3, 1), quant)
    same(torch.zeros(2, 3, 8), quant)
    same(torch.full((2, 8), 1e-45), quant)
    same(torch.randn(700, 64, generator=torch.Generator().manual_seed(0)).reshape(7, 100, 64), quant)
    same(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).T, quant)


@native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_without_a_step(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 5] = bad
    codes, steps = tokens(x, QUANTS[0])
    assert steps.isnan().tolist() == [False, True, False] and codes[0].eq(127).all() and codes[1].eq(0).all()


@native
def test_nothing_is_nothing() -> None:
    codes, steps = tokens(torch.empty(0, 8), QUANTS[0])
    assert codes.shape == (0, 8) and steps.shape == (0,)


@pytest.mark.parametrize("quant", [Quant(Ternary(), PerToken()), Quant(Uniform(8, False), PerToken()), Quant(Uniform(9), PerToken()),
                                   Quant(Uniform(8), PerChannel()), Quant(Uniform(8), PerToken(), MinMax()), Quant(Uniform(8), PerToken(), clip=1.0),
                                   Quant(Uniform(8), PerToken(), Learned()), Quant(Uniform(8), PerToken(), AbsMax(dtype="float16")),
                                   Quant(Uniform(8), PerToken(), AbsMax(reach=1e-6))], ids=str)
def test_what_it_does_not_make_it_says(quant: Quant) -> None:
    assert why_not(quant)
