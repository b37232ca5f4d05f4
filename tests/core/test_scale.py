"""Scales: each by its definition, the cast, the sign policies, nested scales, and the gradient rules that a scale may declare."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Ternary, Uniform
from qatlas.core.place import Place, decode, locate
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax, Moving, MseSearch, Percentile, Rms, Scale
from qatlas.core.stored import SMALLEST

seeds = st.integers(0, 2**31)


def rows(seed: int, n: int = 3, k: int = 17) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 8))
def test_each_scale_is_its_definition(seed: int, bits: int) -> None:
    x, grid = rows(seed), Uniform(bits)
    table = x.tolist()
    high = 2 ** (bits - 1) - 1
    wanted = {
        AbsMax(): [max(map(abs, row)) / high for row in table],
        AbsMax(reach=127.5): [max(map(abs, row)) / 127.5 for row in table],
        AbsMean(1.5): [1.5 * sum(map(abs, row)) / len(row) for row in table],
        AbsMean(2.0, per_root=True): [2 * sum(map(abs, row)) / len(row) / math.sqrt(high) for row in table],
        Rms(0.7): [0.7 * math.sqrt(sum(v * v for v in row) / len(row)) for row in table],
        Percentile(0.75): [sorted(map(abs, row))[12] / high for row in table],         # 0.75 (17 - 1) = 12 exactly
        MinMax("offset"): [(max(row) - min(row)) / (2**bits - 1) for row in table],
        MinMax(): [(max(*row, 0) - min(*row, 0)) / (2**bits - 1) for row in table],
        Learned(AbsMean(3.0)): [3 * sum(map(abs, row)) / len(row) for row in table],
        Moving(Rms()): [math.sqrt(sum(v * v for v in row) / len(row)) for row in table],
    }
    for scale, steps in wanted.items():
        torch.testing.assert_close(scale.measure(x, grid).s[:, 0], torch.tensor(steps, dtype=torch.float64), rtol=1e-12, atol=0)


def test_one_signed_bit_has_only_a_low_end() -> None:
    x = torch.tensor([[-2.0, 0.1, 1.0]])
    assert Quant(Uniform(1), scale=AbsMax()).hard(x).tolist() == [[-2, 0, 0]]
    assert Quant(Uniform(1), scale=Percentile(1.0)).hard(x).tolist() == [[-2, 0, 0]]


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0, 1))
def test_percentile_is_torch_quantile(seed: int, q: float) -> None:
    x = rows(seed)
    torch.testing.assert_close(Percentile(q).measure(x, Ternary()).s[:, 0], x.abs().quantile(q, dim=-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", [Uniform(4), Uniform(4, False)])
def test_min_max_holds_zero_and_both_ends(grid: Uniform) -> None:
    for x in (torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, 3.0]]), torch.zeros(1, 4)):
        place = MinMax().measure(x, grid)
        assert place.zero == place.zero.round() and grid.low <= place.zero <= grid.high
        assert decode(grid.snap(locate(torch.zeros(1, 1), place)), place) == 0         # zero is kept exactly
        y = decode(grid.snap(locate(x, place)), place)
        assert (y - x).abs().max() <= place.s.max()
        offset = MinMax("offset").measure(x, grid)
        assert (decode(grid.snap(locate(x, offset)), offset) - x).abs().max() <= offset.s.max() / 2 + 1e-6


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_search_is_never_worse_than_its_start(seed: int) -> None:
    x, grid = rows(seed).float(), Uniform(3)
    def error(scale: Scale) -> torch.Tensor:
        return (Quant(grid, scale=scale).hard(x) - x).square().sum(-1)
    assert (error(MseSearch(AbsMax(), steps=20)) <= error(AbsMax()) + 1e-7).all()
    nothing = MseSearch(AbsMax(), steps=20).measure(torch.zeros(2, 5), grid)
    assert nothing.s.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SMALLEST)), st.floats(-1e30, 1e30), st.sampled_from([None, 1e-3, 3e-6, 1e-30]))
def test_cast_is_exact_in_its_type_and_keeps_its_floor(dtype: str, value: float, floor: float | None) -> None:
    for sign in ("positive", "abs", "free"):
        scale = AbsMax(dtype=dtype, floor=floor, sign=sign)
        s = scale.cast(torch.tensor([[value], [0.0], [1e-45], [-1e-45]]))
        stored = s.to(getattr(torch, dtype)).to(s.dtype)
        assert torch.equal(stored, s) and s.isfinite().all()       # a second rounding changes nothing: it is in the type
        assert (s.abs() >= torch.tensor(scale.smallest)).all() and scale.smallest >= (floor or 0)
        if sign != "free":
            assert (s > 0).all()


def test_sign_policies() -> None:
    s = torch.tensor([[-2.0], [3.0]])
    floor = AbsMax().smallest
    assert AbsMax().cast(s).tolist() == [[floor], [3.0]]
    assert AbsMax(sign="abs").cast(s).tolist() == [[2.0], [3.0]]
    assert AbsMax(sign="free").cast(s).tolist() == [[-2.0], [3.0]]


def test_nested_scales_are_those_of_the_artefact() -> None:
    inner = Quant(Uniform(6, False), Group(4), AbsMax(dtype="float16"))
    quant = Quant(Uniform(4), Group(8), AbsMax(nested=inner))
    x = rows(1, 3, 32).float()
    stored = quant.quantize(x)
    assert torch.equal(stored.scale.dequantize(), stored.steps) and stored.scale.codes.shape == (3, 4)
    assert torch.equal(stored.dequantize(), quant.hard(x))


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"sign": "maybe"}, {"gradient": "some"}, {"over": "row"}])
def test_a_wrong_word_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(QuantError, match="is one of"):
        AbsMax(**wrong)


def learned(quant: Quant, x: torch.Tensor, g: torch.Tensor, **state: list[float]) -> tuple[torch.Tensor, Quantizer]:
    quantizer = Quantizer(quant)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
    quantizer.load_state_dict(tensors)
    quantizer.double().load_state_dict(tensors)
    x = x.clone().requires_grad_()
    quantizer(x).backward(g)
    return x.grad, quantizer


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 8), st.booleans(), st.floats(0.05, 1.0))
def test_lsq_gradients_are_the_closed_form(seed: int, bits: int, signed: bool, step: float) -> None:
    """LSQ (arXiv 1902.08153) written with Python numbers: round(u) - u inside, the ends outside, over sqrt(N Qp)."""
    x, g = rows(seed, 2, 9), rows(seed + 1, 2, 9)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    dx, quantizer = learned(Quant(Uniform(bits, signed), PerTensor(), Learned(), Clip()), x, g, scale=[step])
    wanted = 0.0
    for value, slope, got in zip(x.flatten().tolist(), g.flatten().tolist(), dx.flatten().tolist(), strict=True):
        u = value / step
        inside = low <= u <= high
        wanted += slope * ((round(u) - u) if inside else (low if u < low else high))
        assert got == (slope if inside else 0)
    assert quantizer.scale.grad.item() == pytest.approx(wanted / math.sqrt(x.numel() * high), rel=1e-12, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 15), st.floats(0.05, 0.5))
def test_affine_gradients_are_those_of_round_then_clip(seed: int, zero: int, step: float) -> None:
    """torch's learnable fake quantization: q = clip(round(x / s + z)); ds = q - z - x/s inside, q - z outside; dz = 0 inside, -s outside."""
    x, g = rows(seed, 2, 9), rows(seed + 1, 2, 9)
    quant = Quant(Uniform(4, False), PerChannel(), Learned(factor=1.0, margin=0.5), Clip(0.5))
    dx, quantizer = learned(quant, x, g, scale=[step, step], zero=[zero, zero])
    for row in range(2):
        ds = dz = 0.0
        for value, slope, got in zip(x[row].tolist(), g[row].tolist(), dx[row].tolist(), strict=True):
            place = round(value / step + zero)
            inside, q = 0 <= place <= 15, min(max(place, 0), 15)
            ds += slope * (q - zero - (value / step if inside else 0))
            dz -= 0 if inside else slope * step
            assert got == (slope if inside else 0)
        assert quantizer.scale.grad[row].item() == pytest.approx(ds, rel=1e-11, abs=1e-11)
        assert quantizer.zero.grad[row].item() == pytest.approx(dz, rel=1e-11, abs=1e-11)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-1.5, 0.5), st.floats(0.05, 0.5))
def test_offset_gradients_are_those_of_lsq_plus(seed: int, offset: float, step: float) -> None:
    """LSQ+ (arXiv 2004.09576): u = (x - m) / s; dm = 0 inside, 1 outside."""
    x, g = rows(seed, 1, 12), rows(seed + 1, 1, 12)
    dx, quantizer = learned(Quant(Uniform(3, False), PerTensor(), Learned(), Clip()), x, g, scale=[step], offset=[offset])
    ds = dm = 0.0
    for value, slope, got in zip(x[0].tolist(), g[0].tolist(), dx[0].tolist(), strict=True):
        u = (value - offset) / step
        inside = 0 <= u <= 7
        ds += slope * ((round(u) - u) if inside else (0 if u < 0 else 7))
        dm += 0 if inside else slope
        assert got == (slope if inside else 0)
    factor = 1 / math.sqrt(12 * 7)
    assert quantizer.scale.grad.item() == pytest.approx(ds * factor, rel=1e-11, abs=1e-11)
    assert quantizer.offset.grad.item() == pytest.approx(dm * factor, rel=1e-11, abs=1e-11)


def test_the_value_gradient_is_the_derivative_of_s_v() -> None:
    """LR-QAT, and the one-bit weights of BiT and ParetoQ: ds = sum g v, also inside."""
    x, g = rows(3, 1, 12), rows(4, 1, 12)
    for grid in (Uniform(3), Ternary(), HalfStep(2)):
        _, quantizer = learned(Quant(grid, PerTensor(), Learned(gradient="value", factor=1.0), Clip()), x, g, scale=[0.4])
        assert quantizer.scale.grad.item() == pytest.approx((g * grid.snap(x / 0.4)).sum().item(), rel=1e-12)


def test_the_margin_decides_ties_as_rounding_does() -> None:
    x = torch.tensor([[-8.75, -8.5, -8.25, 7.25, 7.5]], dtype=torch.float64)           # 7.5 rounds to 8, -8.5 to -8
    dx, _ = learned(Quant(Uniform(4), PerTensor(), Learned(margin=0.5), Clip(0.5)), x, torch.ones_like(x), scale=[1.0])
    assert dx.tolist() == [[0, 1, 1, 1, 0]]
    dx, _ = learned(Quant(Uniform(4), PerTensor(), Learned(), Clip()), x, torch.ones_like(x), scale=[1.0])
    assert dx.tolist() == [[0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("over", "n"), [("scale", 24), ("tensor", 120), ("token", 8)])
def test_the_factor_counts_what_it_says(over: str, n: int) -> None:
    shape = (5, 3, 8)
    view = PerChannel().view(torch.empty(shape)).shape
    assert Learned(over=over).strength(view, shape, Uniform(4)) == pytest.approx(1 / math.sqrt(n * 7))
    assert Learned(factor=0.25).strength(view, shape, Uniform(4)) == 0.25


def test_a_statistic_hears_the_gradient_through_itself() -> None:
    """AECCT: y = s v, s = max|x| / 7; the entry that is the maximum hears ds/dx = sign / 7 on top."""
    x = torch.tensor([[0.3, -2.0, 0.9]], dtype=torch.float64, requires_grad=True)
    Quantizer(Quant(Uniform(4), PerTensor(), AbsMax(gradient="statistic", margin=0.5), Clip(0.5)))(x).sum().backward()
    u = x.detach() / (2 / 7)
    ds = (u.round() - u).sum().item()
    assert x.grad[0].tolist() == pytest.approx([1.0, 1.0 - ds / 7, 1.0])


def test_a_moving_scale_follows_in_training_only() -> None:
    quantizer = Quantizer(Quant(Uniform(4), PerTensor(), Moving(AbsMax(), momentum=0.5))).initialise(torch.tensor([7.0]))
    quantizer(torch.tensor([21.0]))
    assert quantizer.scale.tolist() == [2.0]
    quantizer.eval()(torch.tensor([70.0]))
    assert quantizer.scale.tolist() == [2.0] and not list(quantizer.parameters())


def test_place_and_decode_are_inverse_on_the_grid() -> None:
    v = Uniform(4).values()
    for place in (Place(torch.tensor(0.5)), Place(torch.tensor(0.5), zero=torch.tensor(3.0)), Place(torch.tensor(0.5), offset=torch.tensor(0.25))):
        assert torch.equal(locate(decode(v, place), place), v)
