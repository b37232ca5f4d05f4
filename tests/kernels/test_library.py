"""The library of CPU kernels: its variants, its Hadamard transform, what is said where it is missing."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import QuantError
from qatlas.core.hadamard import hadamard as reference
from qatlas.kernels import library as native

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    VARIANTS = native.variants()
built = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built: python setup.py build_ext --inplace")


@pytest.fixture(params=VARIANTS or ["none"])
def each_variant(request):
    """All that this machine runs, one after another."""
    before = native.variant()
    native.choose(request.param)
    yield request.param
    native.choose(before)


@built
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(0, 37), st.booleans(), st.integers(1, 3), st.sampled_from(VARIANTS or ["none"]))
def test_hadamard_is_that_of_core(power: int, blocks: int, inplace: bool, threads: int, variant: str) -> None:
    native.choose(variant)
    n = 2**power
    x = torch.randn(blocks, n)
    want = reference(x.double()) if blocks else x.double()
    got = native.hadamard(x, n, n**-0.5, x if inplace else None, threads)
    assert (got.data_ptr() == x.data_ptr()) is inplace or not blocks
    assert torch.allclose(got.double(), want, rtol=0, atol=(power + 1) * 2**-23 * max(float(want.abs().max()) if blocks else 0, 1))
    native.choose(VARIANTS[-1])


@built
def test_hadamard_of_whole_numbers_is_exact_and_its_own_inverse(each_variant: str) -> None:
    for n in (1, 2, 4, 8, 16, 32, 64, 512, 4096):
        x = torch.randint(-1000, 1000, (3, 2 * n)).float()
        once = native.hadamard(x, n, 1.0)
        i = torch.arange(n)
        row = torch.tensor([1.0 if int(k).bit_count() % 2 == 0 else -1.0 for k in (i & (n - 1))])       # the last row of the matrix
        assert torch.equal(once.view(3, 2, n)[..., n - 1], (x.view(3, 2, n).double() * row).sum(-1).float())
        assert torch.equal(native.hadamard(once, n, 1 / n), x)


@built
@pytest.mark.parametrize(("x", "block"), [
    (torch.zeros(2, 6), 6), (torch.zeros(2, 8192), 8192), (torch.zeros(2, 8), 16), (torch.zeros(2, 8).double(), 8), (torch.zeros(8, 2).T, 8),
    (torch.zeros(()), 1), (torch.zeros(2, 8), 0)])
def test_what_the_hadamard_does_not_take(x: torch.Tensor, block: int) -> None:
    with pytest.raises(QuantError, match="Hadamard"):
        native.hadamard(x, block, 1.0)


@built
def test_variants_and_a_name_that_is_none() -> None:
    assert VARIANTS[0] == "scalar" and native.variant() in VARIANTS
    with pytest.raises(QuantError, match="does not run the variant 'mmx'.*scalar"):
        native.choose("mmx")


def test_a_missing_library_is_said_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(native, "HERE", tmp_path)
    native.library.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow path.*build_ext"):
        assert native.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None and native.variants() == () and native.variant() == ""
    with pytest.raises(QuantError, match="build_ext"):
        native.hadamard(torch.zeros(2), 2, 1.0)
    (tmp_path / "_native.so").write_text("not a library")
    native.library.cache_clear()
    with pytest.warns(RuntimeWarning, match="not there"):
        assert native.library() is None
    native.library.cache_clear()
