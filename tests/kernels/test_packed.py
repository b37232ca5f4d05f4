"""Packed products: law 8 over every grid and grain, whole numbers bit for bit, floats within their bound, on every variant that this machine runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import every

from qatlas.core.error import QuantError
from qatlas.core.grain import Block, Grain, Group, PerChannel, PerTensor
from qatlas.core.grid import Grid, HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import QTensor, pack_bits
from qatlas.kernels import library as native
from qatlas.kernels import packed
from qatlas.kernels.packed import Matrix, dense, exact, linear, linear_int8, why_not

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    VARIANTS = native.variants()
built = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built: python setup.py build_ext --inplace")
GRIDS = [Uniform(1, False), Sign(), Uniform(2), HalfStep(2), Ternary(), Stretched(3), Stretched(4), Uniform(3), Uniform(4), Uniform(4, False),
         Stretched(16), Uniform(8), Uniform(8, False), HalfStep(8)]


@pytest.fixture(params=VARIANTS or ["none"])
def each_variant(request):
    """All that this machine runs, one after another."""
    before = native.variant()
    native.choose(request.param)
    yield request.param
    native.choose(before)


def tensor(grid: Grid, grain: Grain, rows: int, cols: int, place: str = "", seed: int = 0) -> QTensor:
    """Random codes of a grid, with a zero or an offset if `place` says so."""
    g = torch.Generator().manual_seed(seed)
    codes = grid.encode(grid.values())[torch.randint(0, len(grid.values()), (rows, cols), generator=g)].to(torch.uint8)
    shape = grain.scale_shape((rows, cols))
    zero = torch.randn(shape, generator=g) * 4 if place == "zero" else None
    offset = torch.randn(shape, generator=g) if place == "offset" else None
    return QTensor(codes, torch.rand(shape, generator=g) + 0.01, zero, offset, grid, grain)


def near(y: torch.Tensor, x: torch.Tensor, q: QTensor) -> bool:
    """The bound of packed.py's head."""
    w = q.dequantize().double()
    size = q.grain.back(q.grain.view(q.values()).double().abs() * q.scale.unsqueeze(-1), q.shape)
    for part, by in ((q.zero, q.scale), (q.offset, torch.ones_like(q.scale))):
        if part is not None:
            size = size + q.grain.back((by * part).abs().unsqueeze(-1).expand(q.grain.view(q.values()).shape).double(), q.shape)
    return bool(((y.double() - x.double() @ w.T).abs() <= 2**-24 * (q.shape[1] + 16) * (x.double().abs() @ size.T)).all())


def ends(tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, (tokens, cols), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@built
@pytest.mark.parametrize("grid", [g for g in every(Grid) if g.bits <= 8], ids=repr)
@pytest.mark.parametrize("grain", [PerTensor(), PerChannel(), Group(32), Group(24), Block(2, 4), PerChannel(1)], ids=repr)
def test_law_8_over_every_grid(grid: Grid, grain: Grain) -> None:
    q = tensor(grid, grain, 18, 96)
    if why_not(grid, grain, (18, 96)):
        with pytest.raises(QuantError, match="no kernel"):
            Matrix.of(q)
        return
    w, x = Matrix.of(q), torch.randn(5, 96)
    assert torch.equal(w.dequantize(), q.dequantize())
    assert near(linear(x, w), x, q)
    if why_not(grid, grain, (18, 96), integers=True):
        with pytest.raises(QuantError, match="no kernel multiplies int8"):
            linear_int8(ends(5, 96), torch.ones(5), None, w)
        return
    codes, steps = ends(5, 96), torch.rand(5)
    assert torch.equal(linear_int8(codes, steps, None, w), exact(codes, steps, None, w))


@built
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 70), st.sampled_from(["", "zero", "offset"]),
       st.booleans(), st.booleans(), st.integers(1, 3), st.sampled_from(VARIANTS or ["none"]), st.integers(0, 9999))
def test_any_shape(grid, rows, times, groups, tokens, place, zeros, bent, threads, variant, seed) -> None:
    native.choose(variant)
    unit = packed.UNIT[int(grid.bits)]
    cols = times * unit * groups if groups > 1 else times * unit - seed % 7
    cols = max(cols, 1)
    grain = Group(times * unit) if groups > 1 else PerChannel() if seed % 2 else PerTensor()
    q = tensor(grid, grain, rows, cols, place, seed)
    x, bias = torch.randn(tokens, cols), torch.randn(rows) if bent else None
    codes, steps, zero = ends(tokens, cols, seed), torch.rand(tokens), torch.randint(-128, 128, (tokens,)).float() if zeros else None
    for w in [Matrix.of(q)] + ([dense(Matrix.of(q))] if len(grid.values()) == 3 else []):
        got = linear(x, w, bias, threads)
        assert near(got if bias is None else got - bias, x, q) or torch.allclose(got, F.linear(x, q.dequantize(), bias), rtol=1e-4, atol=1e-4)
        if not why_not(grid, grain, (rows, cols), integers=True):
            assert torch.equal(linear_int8(codes, steps, zero, w, bias, threads), exact(codes, steps, zero, w, bias))
    native.choose(VARIANTS[-1])


@built
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("code", ["lowest", "highest"])
def test_worst_sums_do_not_overflow(grid: Grid, code: str, each_variant: str) -> None:
    q = tensor(grid, PerChannel(), 17, 8192)
    q.codes.fill_(int(q.codes.min() if code == "lowest" else q.codes.max()))
    ws = [Matrix.of(q)] + ([dense(Matrix.of(q))] if len(grid.values()) == 3 else [])
    for w in ws:
        for end in (-128, 127):
            codes = torch.full((3, 8192), end, dtype=torch.int8)
            if not why_not(grid, PerChannel(), (17, 8192), integers=True):
                assert torch.equal(linear_int8(codes, torch.ones(3), None, w), exact(codes, torch.ones(3), None, w))


def test_sums_that_may_overflow_are_refused() -> None:
    assert why_not(Uniform(8), PerChannel(), (1, 131000), integers=True) == ""
    assert "2^31" in why_not(Uniform(8), PerChannel(), (1, 131072), integers=True) and not why_not(Uniform(8), PerChannel(), (1, 131072))
    assert "2^31" in why_not(Uniform(8, False), PerChannel(), (1, 65800), integers=True)


@built
def test_digits_hold_ternary_codes_in_1_6_bits() -> None:
    q = tensor(Ternary(), PerChannel(), 8, 4096)
    w = dense(Matrix.of(q))
    assert torch.equal(w.unpacked(), q.codes) and w.codes.shape == (8, 820) and torch.equal(w.dequantize(), q.dequantize())
    with pytest.raises(QuantError, match="three values"):
        dense(Matrix.of(tensor(Uniform(2), PerChannel(), 8, 64)))
    with pytest.raises(QuantError, match="three values"):
        dense(Matrix.of(tensor(Uniform(4), PerChannel(), 8, 64)))


@built
@pytest.mark.parametrize("place", ["", "zero", "offset"])
@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_wild_activations_do_as_dequantize(place: str, wild: float, each_variant: str) -> None:
    for grid in (Ternary(), Uniform(3), Uniform(4), Uniform(8)):
        q = tensor(grid, Group(32), 20, 64, place)
        q.scale, q.offset = q.scale / 1000, None if q.offset is None else q.offset / 1000      # no product passes 3.4e38, whatever the order
        x = torch.randn(9, 64)
        x[1, 3], x[4, 40], x[4, 41] = wild, wild, -wild
        want = F.linear(x, q.dequantize())
        got = linear(x, Matrix.of(q))
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        fine = want.isfinite()
        size = (x.double().abs() @ q.dequantize().double().abs().T).nan_to_num()
        assert ((got.double() - want.double())[fine].abs() <= 1e-5 * size[fine]).all()


@built
def test_how_x_lies_does_not_matter() -> None:
    q = tensor(Uniform(4), Group(32), 10, 64)
    w, x, codes = Matrix.of(q), torch.randn(6, 64), ends(6, 64)
    want, whole = linear(x, w), linear_int8(codes, torch.ones(6), None, w)
    strided, slipped = torch.randn(64, 6).T.copy_(x), torch.empty(6 * 64 + 1)[1:].view(6, 64).copy_(x)
    assert not strided.is_contiguous() and slipped.data_ptr() % 16
    assert torch.equal(linear(strided, w), want) and torch.equal(linear(slipped, w), want)
    assert torch.equal(linear(x.view(2, 3, 64), w), want.view(2, 3, 10)) and torch.allclose(linear(x[0], w), want[0], rtol=1e-5, atol=1e-4)
    odd = torch.empty(6 * 64 + 1, dtype=torch.int8)[1:].view(6, 64).copy_(codes)
    assert torch.equal(linear_int8(odd, torch.ones(6), None, w), whole)
    assert torch.equal(linear_int8(codes.view(2, 3, 64), torch.ones(2, 3), None, w), whole.view(2, 3, 10))
    assert linear(x[:0], w).shape == (0, 10) and linear(torch.zeros(0, 5, 64), w).shape == (0, 5, 10)
    for low in (torch.bfloat16, torch.float16, torch.float64):
        assert linear(x.to(low), w).dtype == low and torch.equal(linear(x.to(low), w), linear(x.to(low).float(), w).to(low))


@built
def test_a_mapped_file_is_used_where_it_lies(tmp_path: Path) -> None:
    q, file = tensor(Uniform(4), PerChannel(), 16, 64), tmp_path / "codes"
    file.write_bytes(pack_bits(q.codes, 4).numpy().tobytes())
    codes = torch.from_file(str(file), shared=False, size=16 * 32, dtype=torch.uint8).view(16, 32)
    w, x = Matrix.from_parts(codes, q.scale, None, None, q.grid, q.grain, (16, 64)), torch.randn(2, 64)
    assert w.codes.data_ptr() == codes.data_ptr() and torch.equal(linear(x, w), linear(x, Matrix.of(q)))


@built
def test_what_does_not_fit_is_said() -> None:
    q = tensor(Uniform(4), Group(32), 10, 64)
    w, x, codes = Matrix.of(q), torch.randn(6, 64), ends(6, 64)
    op, rest = torch.ops.qatlas.packed_linear, (None, None, None, w.table, w.conf, w.reals, w.strides, 1)
    for call, words in (
            (lambda: linear(x[:, :63], w), r"\(..., 64\)"), (lambda: linear(x.int(), w), "int32"), (lambda: linear(x, w, torch.zeros(9)), "bias"),
            (lambda: linear_int8(x, torch.ones(6), None, w), "int8"), (lambda: linear_int8(codes, torch.ones(5), None, w), "step"),
            (lambda: linear_int8(codes, torch.ones(6), torch.ones(2), w), "zero"),
            (lambda: Matrix.from_parts(w.codes[:, 1:], q.scale, None, None, q.grid, q.grain, (10, 64)), r"uint8 \(10, 32\)"),
            (lambda: Matrix.from_parts(w.codes, q.scale[:, :1], None, None, q.grid, q.grain, (10, 64)), "scale"),
            (lambda: op(x, w.codes[:, :16].contiguous(), w.scale, *rest), "codes"), (lambda: op(x, w.codes, w.scale[:1], *rest), "scales"),
            (lambda: op(x[:, :8], w.codes, w.scale, *rest), "elements")):
        with pytest.raises(QuantError, match=words):
            call()
    packed._say.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow path.*group of 4"):
        assert packed.matrix(tensor(Uniform(4), Group(4), 2, 8)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed.matrix(tensor(Uniform(4), Group(4), 2, 8)) is None and packed.matrix(q) is not None


@built
def test_operators_keep_torchs_rules() -> None:
    for grid in (Uniform(4), Uniform(8)):
        w = Matrix.of(tensor(grid, Group(32), 10, 64, "zero"))
        x, last = torch.randn(3, 64), (w.conf, w.reals, w.strides, 1)
        torch.library.opcheck(torch.ops.qatlas.packed_linear.default, (x, w.codes, w.scale, w.zero, None, None, w.table, *last))
        torch.library.opcheck(torch.ops.qatlas.packed_linear_int8.default, (ends(3, 64), torch.ones(3), torch.ones(3), w.codes, w.scale, w.zero, None,
                                                                            torch.ones(10), w.sums, *last))


@built
def test_compile_and_autocast_see_the_operators() -> None:
    w, x, codes = Matrix.of(tensor(Uniform(4), Group(32), 10, 64)), torch.randn(3, 64), ends(3, 64)

    def both(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return linear(x, w) + linear_int8(codes, torch.ones(3), None, w)

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x, codes), both(x, codes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, w)
    assert y.dtype == torch.bfloat16 and torch.equal(y, linear(x.bfloat16(), w))


@built
def test_a_gradient_goes_the_slow_way() -> None:
    q = tensor(Uniform(4), Group(32), 10, 64)
    x = torch.randn(3, 64, requires_grad=True)
    linear(x, Matrix.of(q)).sum().backward()
    assert torch.allclose(x.grad, q.dequantize().sum(0).expand(3, 64), atol=1e-4)


@built
def test_threads_of_python_and_ours() -> None:
    w, x = Matrix.of(tensor(Uniform(2), Group(64), 200, 256)), torch.randn(5, 256)
    want, found = linear(x, w, threads=1), []

    def work() -> None:
        found.extend(torch.equal(linear(x, w, threads=n), want) for n in (1, 2, 3, 4) * 10)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 160 and all(found)


FORK = """
import os, sys, torch
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.kernels.packed import Matrix, linear
codes = torch.randint(0, 256, (100, 32), dtype=torch.uint8)
w, x = Matrix.from_parts(codes, torch.rand(100), None, None, Uniform(4), PerChannel(), (100, 64)), torch.randn(2, 64)
want = linear(x, w, threads=2)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(x, w, threads=2), want) else 3)
same = torch.equal(linear(x, w, threads=2), want)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if same else 4)
"""


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_fork_does_not_hang() -> None:
    path = os.pathsep.join(sys.path)
    assert subprocess.run([sys.executable, "-c", FORK], env={**os.environ, "PYTHONPATH": path}, timeout=120).returncode == 0


def test_without_the_library_the_numbers_are_the_same(monkeypatch) -> None:
    monkeypatch.setattr(packed, "library", lambda: None)
    q = tensor(Uniform(4), Group(32), 10, 64, "zero")
    w, x, codes = Matrix.of(q), torch.randn(3, 64), ends(3, 64)
    assert torch.equal(linear(x, w), F.linear(x, q.dequantize()))
    zero = torch.tensor([1.0, -3.0, 0.0])
    assert torch.allclose(linear_int8(codes, torch.ones(3), zero, w), F.linear(codes - zero.unsqueeze(1), q.dequantize()), rtol=1e-4, atol=1e-2)
