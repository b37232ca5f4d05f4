"""Packed products equal dequantize-then-multiply: floats to the rounding of their type, integers bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.codebook import NF4
from qatlas.core.error import QuantError, RunError
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import pack_bits
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MinMax
from qatlas.kernels.triton import lang, linear
from qatlas.kernels.triton.gemm import run as gemm
from qatlas.kernels.triton.gemv import run as gemv
from qatlas.kernels.triton.matrix import Matrix, why_not
from qatlas.kernels.triton.plan import FOUND, Plan, candidates, plan, tune

GRIDS = [Sign(), Ternary(), Uniform(2), HalfStep(2), Uniform(3), Uniform(4), Uniform(4, False), Uniform(4, narrow=True), Uniform(5), Uniform(7),
         Uniform(8), Uniform(8, False), HalfStep(8), Stretched(3), Stretched(4), Uniform(1, False), NF4, Float(2, 1), Float(4, 3)]
OFF = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def weight(grid, grain=PerChannel(), scale=AbsMax(), rows=21, width=64, seed=0):
    return Quant(grid, grain, scale).quantize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(y, x, q, bias=None):
    """Within the rounding of the type of x, of the sum of the products' magnitudes."""
    w = q.dequantize().double()
    wanted, size = x.cpu().double() @ w.T, x.cpu().double().abs() @ w.abs().T
    if bias is not None:
        wanted, size = wanted + bias.cpu().double(), size + bias.cpu().double().abs()
    assert y.dtype == x.dtype and y.shape == wanted.shape
    assert ((y.cpu().double() - wanted).abs() <= OFF[x.dtype] * size + 1e-30).all()


def moved(q, device):
    parts = (None if t is None else t.to(device) for t in (pack_bits(q.codes, q.bits), q.steps, q.zero, q.offsets))
    return Matrix.from_parts(*parts, q.grid, q.grain, tuple(q.shape))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid(grid, device):
    bias = inputs(21, seed=2).to(device)
    for grain, zero in ((PerChannel(), "integer"), (PerTensor(), "offset"), (Group(16), "integer"), (Group(16), "offset")):
        for scale in ((AbsMax(dtype="float16"), MinMax(zero=zero)) if isinstance(grid, Uniform) and grid.signed is False else (AbsMax(),)):
            q = weight(grid, grain, scale)
            w = moved(q, device)
            assert torch.equal(w.dequantize().cpu(), q.dequantize())
            for batch in (1, 3):
                x = inputs(batch, 64).to(device)
                agrees(linear.linear(x, w, bias), x, q, bias)


@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_every_type(dtype, device):
    for grid, grain in ((Uniform(4), Group(32)), (HalfStep(8), PerChannel()), (Ternary(), PerTensor())):
        q = weight(grid, grain)
        for x in (inputs(1, 64), inputs(5, 64)):
            agrees(linear.linear(x.to(device, dtype), moved(q, device)), x.to(device, dtype), q)


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 150), batch=st.sampled_from([1, 2, 17]), grid=st.sampled_from(GRIDS))
def test_odd_shapes_and_tails(rows, width, batch, grid):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, x = weight(grid, rows=rows, width=width), inputs(batch, width).to(device)
    agrees(linear.linear(x, moved(q, device)), x, q)


@pytest.mark.parametrize("group", [48, 32, 16, 96])
def test_groups_that_no_power_of_two_divides(group, device):
    for bits in (1, 3, 8):
        q = weight(Uniform(bits, False), Group(group), MinMax(), width=288, rows=5)
        for batch in (1, 2):
            x = inputs(batch, 288).to(device)
            agrees(linear.linear(x, moved(q, device)), x, q)


@pytest.mark.parametrize("splits", [2, 3])
def test_programs_that_share_a_row(splits, device):
    bias = inputs(21, seed=2).to(device)
    for grain in (PerChannel(), Group(32)):
        q, x = weight(Uniform(4), grain, width=224), inputs(17, 224).to(device)
        w = moved(q, device).floats
        agrees(gemm(x, w, bias, Plan(bn=16, bm=16, bk=32, splits=splits)), x, q, bias)
        agrees(gemv(x[0], w, bias, Plan(bn=8, gb=1, splits=splits)), x[0], q, bias)


def test_nothing_and_strides(device):
    q, bias = weight(Uniform(4)), inputs(21).to(device)
    w = moved(q, device)
    assert linear.linear(torch.zeros(0, 64, device=device), w).shape == (0, 21)
    assert linear.linear(torch.zeros(2, 0, 3, 64, device=device), w, bias).shape == (2, 0, 3, 21)
    none = torch.zeros(0, 32, dtype=torch.uint8, device=device)
    empty = Matrix.from_parts(none, torch.ones(1), None, None, Uniform(4), PerTensor(), (0, 64))
    assert linear.linear(torch.zeros(2, 64, device=device), empty).shape == (2, 0)
    x = inputs(64, 6).to(device).T                                # not contiguous
    agrees(linear.linear(x, w), x, q)
    assert torch.equal(linear.linear(x, w), linear.linear(x.contiguous(), w))
    assert torch.equal(linear.linear(x.reshape(2, 3, 64), w), linear.linear(x, w).reshape(2, 3, 21))
    agrees(linear.linear(x[0], w), x[0], q)
    wide = torch.zeros(21, 40, dtype=torch.uint8, device=device)  # rows of a wider buffer
    wide[:, :32] = pack_bits(q.codes, 4).to(device)
    other = Matrix.from_parts(wide[:, :32], q.steps.to(device), None, None, q.grid, q.grain, (21, 64))
    assert torch.equal(linear.linear(x, other), linear.linear(x, w))


def test_codes_in_place(device):
    codes = pack_bits(weight(Uniform(4)).codes, 4).to(device)
    q = weight(Uniform(4))
    assert Matrix.from_parts(codes, q.steps, None, None, q.grid, q.grain, (21, 64)).codes.data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("grid", [Uniform(4), Ternary(), Sign(), NF4], ids=str)
def test_nan_and_infinity_go_where_they_go(grid, device):
    q = weight(grid, Group(32))
    for batch in (1, 4):
        x = inputs(batch, 64)
        x[0, 3], x[batch - 1, 40] = torch.inf, -torch.inf if batch > 1 else 1.0
        for bad in (x, torch.where(x == torch.inf, torch.nan, x)):
            y, wanted = linear.linear(bad.to(device), moved(q, device)).cpu(), bad @ q.dequantize().T
            assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
            assert torch.equal(y[y.isinf()], wanted[wanted.isinf()])


def exact(q, codes, steps, zero, bias):
    """`linear_int8` as kernels/packed.py states it, in torch: whole numbers in int64, then fp32 in one order."""
    w = Matrix.of(q).integers
    a, low, part = w.whole
    v, groups = a * q.codes.long() + low, w.scale.shape[1]

    def summed(c):
        total = torch.zeros(len(c), w.rows)
        for g in range(groups):
            some = slice(g * w.group, (g + 1) * w.group)
            d, x = (c[:, some] @ v[:, some].T).float() * part, c[:, some].sum(1, keepdim=True).float()
            d = d if w.zero is None else d - w.zero[:, g].float() * x
            d = w.scale[:, g].float() * d
            total = total + (d if w.offset is None else d + w.offset[:, g].float() * x)
        return total

    y = summed(codes.long())
    y = y if zero is None else y - zero[:, None] * summed(torch.ones(1, w.width, dtype=torch.long))
    y = steps[:, None] * y
    return y if bias is None else y + bias


@pytest.mark.parametrize("grid", [g for g in GRIDS if g not in (NF4, Float(2, 1), Float(4, 3), Stretched(3))], ids=str)
def test_integers_bit_for_bit(grid, device):
    for grain in (PerChannel(), Group(32)):
        for scale in (AbsMax(), MinMax(), MinMax(zero="offset")) if grid in (Uniform(4, False), Uniform(8)) else (AbsMax(),):
            q = weight(grid, grain, scale)
            w = moved(q, device)
            for batch, zero, bias in ((1, None, None), (18, inputs(18), inputs(21)), (2, torch.tensor([3.0, -128.0]), None)):
                codes = torch.randint(-128, 128, (batch, 64), generator=torch.Generator().manual_seed(3)).to(torch.int8)
                steps = inputs(batch).abs()
                *given_, b = (None if t is None else t.to(device) for t in (codes, steps, zero, bias))
                y = linear.linear_int8(*given_, w, b)
                assert torch.equal(y.cpu(), exact(q, codes, steps, zero, bias))


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 300), batch=st.sampled_from([0, 1, 17]), bits=st.integers(1, 8))
def test_integers_of_odd_shapes(rows, width, batch, bits):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q = weight(Uniform(bits, False), scale=MinMax(), rows=rows, width=width)
    codes = torch.randint(-128, 128, (batch, width), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    y = linear.linear_int8(codes.to(device), torch.ones(batch, device=device), None, moved(q, device))
    assert torch.equal(y.cpu(), exact(q, codes, torch.ones(batch), None, None))


def test_the_largest_sums(device):
    """All weights and all activations at their ends: what a 16-bit inner sum could not hold."""
    for grid in (Sign(), Ternary(), Uniform(8), HalfStep(8)):
        q = weight(grid, width=256)
        for code, weights in ((127, -1), (-128, 0)):
            q.codes = torch.full_like(q.codes, 2 if grid == Ternary() and weights else 2**q.bits - 1 if weights else 0)
            codes = torch.full((2, 256), code, dtype=torch.int8)
            y = linear.linear_int8(codes.to(device), torch.ones(2, device=device), None, moved(q, device))
            assert torch.equal(y.cpu(), exact(q, codes, torch.ones(2), None, None))


def test_fp8(device):
    if lang.capability(device) < (8, 9):
        pytest.skip("no fp8 on this GPU")
    for grain in (PerChannel(), Group(32)):
        q = weight(Float(4, 3), grain)
        codes, steps = inputs(5, 64).to(torch.float8_e4m3fn), inputs(5).abs()
        y = linear.linear_fp8(codes.to(device), steps.to(device), moved(q, device), inputs(21, seed=5).to(device))
        wanted = steps[:, None] * (codes.float() @ q.dequantize().T) + inputs(21, seed=5)
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_fp8_is_refused_where_the_chip_has_none(monkeypatch, device):
    q, codes = weight(Float(4, 3)), torch.zeros(1, 64, dtype=torch.float8_e4m3fn, device=device)
    monkeypatch.setattr(linear, "capability", lambda device: (8, 0))
    with pytest.raises(QuantError, match="8.9 .*this GPU has 8.0; take linear_int8"):
        linear.linear_fp8(codes, torch.ones(1, device=device), moved(q, device))
    with pytest.raises(QuantError, match="not of Float"):
        linear.linear_fp8(codes, torch.ones(1, device=device), moved(weight(Uniform(8)), device))


def test_the_operators_know_their_shapes(device):
    w, x = moved(weight(Uniform(4)), device), inputs(3, 64).to(device)
    p, q = w.floats, w.integers
    torch.library.opcheck(torch.ops.qatlas_triton.linear, (x, p.codes, p.scale, None, None, None, p.shift, 21, 64, 4, 64),
                          test_utils=("test_schema", "test_faketensor"))
    codes = torch.ones(3, 64, dtype=torch.int8, device=device)
    torch.library.opcheck(torch.ops.qatlas_triton.linear_int8, (codes, x[:, 0].clone(), None, q.codes, q.scale, None, None, None, None, 21, 64, 4, 64,
                                                               *q.whole), test_utils=("test_schema", "test_faketensor"))


def test_a_gradient_goes_through_the_dequantized_weight(device):
    q, x = weight(Uniform(4)), inputs(2, 64).to(device).requires_grad_()
    linear.linear(x, moved(q, device)).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), q.dequantize().sum(0).expand(2, 64))


def test_what_does_not_fit_is_said(device):
    w, x = moved(weight(Uniform(4)), device), torch.zeros(2, 64, device=device)
    for wrong, said in ((x[:, 1:], "do not fit a weight of 21 x 64"), (x.double(), "take float16, bfloat16 and float32")):
        with pytest.raises(QuantError, match=said):
            linear.linear(wrong, w)
    with pytest.raises(QuantError, match="bias of a packed weight"):
        linear.linear(x, w, torch.zeros(20, device=device))
    with pytest.raises(QuantError, match="take int8"):
        linear.linear_int8(x.to(torch.uint8), torch.ones(2, device=device), None, w)
    with pytest.raises(QuantError, match="one step a token"):
        linear.linear_int8(x.to(torch.int8), torch.ones(3, device=device), None, w)
    with pytest.raises(QuantError, match="no whole numbers"):
        linear.linear_int8(x.to(torch.int8), torch.ones(2, device=device), None, moved(weight(NF4), device))
    with pytest.raises(QuantError, match="packed codes of a"):
        Matrix.from_parts(w.codes[:, 1:], torch.ones(21), None, None, Uniform(4), PerChannel(), (21, 64))
    with pytest.raises(QuantError, match="the scale of a"):
        Matrix.from_parts(w.codes, torch.ones(20), None, None, Uniform(4), PerChannel(), (21, 64))
    with pytest.raises(QuantError, match="steps alone"):
        Matrix.from_parts(w.codes, torch.ones(21), torch.ones(21), None, NF4, PerChannel(), (21, 64))
    with pytest.raises(RunError, match="no Triton kernel"):
        linear.linear(torch.zeros(1, 64, device="meta"), w)


@pytest.mark.needs_no_triton
@pytest.mark.parametrize(("grid", "grain", "shape", "said"), [
    (Uniform(4), PerChannel(), (2, 3, 4), "3 axes"), (Uniform(12), PerChannel(), (4, 32), "1 to 8 bits"),
    (Uniform(4, None), PerChannel(), (4, 32), "signed"), (Uniform(4), Block(2, 2), (4, 32), "PerTensor"),
    (Uniform(4), PerChannel(1), (4, 32), "PerTensor"), (Uniform(4), Group(8), (4, 32), "groups of 8"),
    (Uniform(4), Group(5), (4, 32), "does not divide")])
def test_why_not(grid, grain, shape, said):
    assert said in why_not(grid, grain, shape)
    assert not why_not(Uniform(4), Group(32), (4, 64), integers=True)
    assert "groups of 16" in why_not(Uniform(4), Group(16), (4, 64), integers=True)
    assert "2^31" in why_not(Uniform(8), PerChannel(), (1, 2**20), integers=True)


@pytest.mark.needs_no_triton
def test_without_triton(monkeypatch):
    monkeypatch.setattr(lang, "ABSENT", "Triton is not here (No module named 'triton'); pip install triton")
    with pytest.raises(RunError, match="pip install triton"):
        lang.need(torch.device("cpu"))
    assert "pip install triton" in why_not(Uniform(4), PerChannel(), (4, 64), device=torch.device("cuda"))


def test_plans(device):
    w = moved(weight(Uniform(4)), device).floats
    for kind in ("gemv", "gemm", "int8"):
        some = candidates(kind, w, 1 if kind == "gemv" else 16)
        assert len(set(some)) == len(some) > 20 and some[0] == plan(kind, w, 1 if kind == "gemv" else 16)

    def seconds(p):
        if p.bn == 4:
            raise ValueError("does not fit")
        return abs(p.bn - 16) + p.warps

    try:
        best = tune("gemv", w, 1, seconds)
        assert (best.bn, best.warps) == (16, 2) and plan("gemv", w, 1) == best
    finally:
        FOUND.clear()
