"""Quant and Quantizer: the three ways of one formula, refit, calibration, state."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerChannel, PerTensor, PerToken
from qatlas.core.grid import Sign, Ternary, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax, Moving

seeds = st.integers(0, 2**31)
STATIC = Quant(Uniform(4, None), PerTensor(), Learned(AbsMax(), over="token"), Clip())


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_refit_is_least_squares(seed: int) -> None:
    """No other step of the same codes is nearer; TWN's is the mean of the survivors, a binary net's mean|w|."""
    x = draw(seed, 3, 20)
    twn = Quant(Ternary(0.7), scale=AbsMean(), refit=True)
    stored = twn.quantize(x)
    v, s = stored.values(), stored.steps
    for row in range(3):
        alive = v[row] != 0
        assert s[row].item() == pytest.approx(x[row][alive].abs().mean().item(), rel=1e-5)
    error = (x - s[:, None] * v).square().sum(1)
    for times in (0.99, 1.01):
        assert (error <= (x - times * s[:, None] * v).square().sum(1)).all()
    torch.testing.assert_close(Quant(Sign(), scale=AbsMean(), refit=True).quantize(x).steps, x.abs().mean(1))


def test_refit_keeps_the_step_where_all_is_zero() -> None:
    y = Quant(Ternary(0.7), scale=AbsMean(), refit=True).hard(torch.zeros(2, 5))
    assert torch.equal(y, torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shape_and_type_stay(dtype: torch.dtype) -> None:
    x = draw(0, 2, 3, 8).to(dtype)
    quantizer = Quantizer(Quant(Uniform(4), PerToken()))
    assert quantizer(x).shape == x.shape and quantizer(x).dtype == dtype and quantizer.hard(x).dtype == dtype


def test_codes_come_from_the_step_that_is_stored() -> None:
    x = draw(0, 4, 32)
    stored = Quant(Uniform(4), Group(32), AbsMax(dtype="float8_e4m3fn")).quantize(x)
    assert torch.equal(stored.codes.float() - 8, (x / stored.steps).round().clamp(-8, 7))


def test_used_before_it_is_ready() -> None:
    quantizer = Quantizer(STATIC)
    assert not quantizer.ready and "not calibrated" in repr(quantizer)
    with pytest.raises(QuantError, match="before it is initialised"):
        quantizer(draw(0, 2, 8))
    with pytest.raises(QuantError, match="before it is initialised"):
        quantizer.quantize(draw(0, 2, 8))


def calibrated(*batches: torch.Tensor) -> Quantizer:
    quantizer = Quantizer(STATIC)
    quantizer.observe()
    for batch in batches:
        assert quantizer(batch) is batch                           # calibration lets x pass
    quantizer.settle()
    return quantizer


def test_calibration_decides_the_sign_and_measures_all_batches() -> None:
    unsigned = calibrated(draw(0, 2, 8).abs(), 5 * torch.ones(1, 8))
    assert unsigned.quant.grid == Uniform(4, False) and unsigned.scale.tolist() == pytest.approx([5 / 15])
    signed = calibrated(draw(0, 2, 8), torch.tensor([[14.0]]))
    assert signed.quant.grid == Uniform(4, True) and signed.scale.tolist() == [2.0]
    assert unsigned.ready and isinstance(unsigned.scale, nn.Parameter)


def test_calibration_that_saw_nothing_or_nonsense() -> None:
    quantizer = Quantizer(STATIC)
    quantizer.settle()                                             # never asked to observe: nothing happens
    assert not quantizer.ready
    quantizer.observe()
    with pytest.raises(QuantError, match="saw no input"):
        quantizer.settle()
    with pytest.raises(QuantError, match="NaN or infinity"):
        calibrated(torch.tensor([[1.0, torch.nan]]))


def test_calibration_gathers_over_ranks() -> None:
    quantizer = Quantizer(STATIC)
    quantizer.observe()
    quantizer(torch.ones(1, 4))
    quantizer.settle(gather=lambda seen: torch.cat([seen, 30 * seen], -1))
    assert quantizer.scale.tolist() == [2.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_spoiled_weight_is_refused(bad: float) -> None:
    with pytest.raises(QuantError, match=r"shape \(1, 2\) holds NaN or infinity"):
        Quantizer(Quant(Uniform(4), PerChannel(), Learned())).initialise(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("scale", [Learned(), Moving()])
def test_kept_scales_cannot_serve_tokens(scale: Learned | Moving) -> None:
    with pytest.raises(QuantError, match="per token"):
        Quantizer(Quant(Uniform(4), PerToken(), scale))


@pytest.mark.parametrize("scale", [Learned(), Learned(MinMax()), Learned(MinMax("offset")), Moving(AbsMax()), Moving(MinMax())])
def test_state_fills_a_module_that_was_never_calibrated(scale: Learned | Moving) -> None:
    quant = Quant(Uniform(4, False), PerChannel(), scale)
    one, other = nn.Sequential(Quantizer(quant)), nn.Sequential(Quantizer(quant))
    x = draw(1, 3, 8)
    one[0].initialise(x)
    assert all(t.dtype == torch.float32 and t.dim() >= 1 for t in one.state_dict().values())
    other.load_state_dict(one.state_dict())
    assert other[0].ready and torch.equal(other[0](x), one[0](x))
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in one.named_parameters()]
    assert [n for n, _ in other.named_buffers()] == [n for n, _ in one.named_buffers()]


def test_initialising_again_replaces_the_scale() -> None:
    quantizer = Quantizer(Quant(Uniform(4), PerTensor(), Learned())).initialise(torch.tensor([7.0]))
    quantizer.initialise(torch.tensor([14.0]))
    assert quantizer.scale.tolist() == [2.0] and len(list(quantizer.parameters())) == 1


def test_off_lets_pass() -> None:
    quantizer = Quantizer(STATIC)
    quantizer.on = False
    x = draw(0, 3)
    assert quantizer(x) is x


def test_a_learned_zero_is_whole_and_on_the_grid() -> None:
    quantizer = Quantizer(Quant(Uniform(4, False), PerTensor(), Learned(MinMax()))).initialise(draw(0, 20))
    for zero, kept in ((3.4, 3), (-2.0, 0), (99.0, 15)):
        quantizer.zero.data.fill_(zero)
        assert torch.unique(quantizer(torch.zeros(4))).tolist() == [0]
        assert quantizer.quantize(torch.zeros(4)).codes.unique().tolist() == [kept]


def test_a_scale_below_zero_follows_its_sign_policy() -> None:
    x = draw(0, 16)
    for sign in ("positive", "abs", "free"):
        quantizer = Quantizer(Quant(Uniform(4), PerTensor(), Learned(sign=sign))).initialise(x)
        quantizer.scale.data.neg_()
        assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())
        assert (quantizer.quantize(x).steps < 0).item() == (sign == "free")


@pytest.mark.parametrize("sign, turned", [("abs", -1), ("free", 1)])
def test_the_gradient_of_a_scale_below_zero(sign: str, turned: int) -> None:
    """Finite differences of y in s, at fixed codes: "abs" turns the gradient round, as |s| does."""
    x, step = draw(5, 64), 1e-3
    quantizer = Quantizer(Quant(Uniform(4), PerTensor(), Learned(sign=sign, factor=1.0, gradient="value"), Clip())).initialise(x)
    quantizer.scale.data.fill_(-0.3)
    v = quantizer(x).detach() / -0.3
    quantizer(x).square().sum().backward()
    slope = ((v * (-0.3 + step)).square().sum() - (v * (-0.3 - step)).square().sum()) / (2 * step)
    torch.testing.assert_close(quantizer.scale.grad, slope.reshape(1), rtol=1e-3, atol=1e-3)
    assert (quantizer.quantize(x).steps < 0).item() == (turned == 1)


def test_a_state_without_its_signedness_is_not_ready() -> None:
    """A state dict has the scale and not the sign; taken as signed, half of the unsigned range would be cut off unseen."""
    one, other = Quantizer(STATIC), Quantizer(STATIC)
    one.observe()
    one(draw(1, 4, 8).abs())
    one.settle()
    other.load_state_dict(one.state_dict())
    assert one.ready and not other.ready
    with pytest.raises(QuantError, match="calibrate"):
        other(draw(1, 4, 8).abs())


def test_an_expert_without_tokens() -> None:
    quantizer = Quantizer(Quant(Uniform(4), PerTensor(), Learned(), Clip())).initialise(draw(0, 16))
    assert quantizer(torch.zeros(0, 8)).shape == (0, 8)


def test_a_learned_scale_that_shall_not_hear_anything_is_refused() -> None:
    with pytest.raises(QuantError, match="'clipped' or 'value'"):
        Learned(gradient="none")


def test_a_clip_cuts_first_and_lets_no_gradient_pass_at_the_cut():
    x = torch.tensor([[-3.0, -1.0, 0.2, 1.0, 0.9]], dtype=torch.float64, requires_grad=True)
    quant = Quant(Uniform(4), scale=AbsMax(), clip=1.0)
    quantizer = Quantizer(quant)
    y = quantizer(x)
    assert torch.equal(y, Quant(Uniform(4), scale=AbsMax()).hard(x.detach().clamp(-1, 1)))
    torch.testing.assert_close(y.detach(), quantizer.quantize(x.detach()).dequantize().double())
    y.backward(torch.ones_like(y))
    assert x.grad.tolist() == [[0, 0, 1, 0, 1]]
    with pytest.raises(QuantError, match="positive number"):
        Quant(Uniform(4), clip=0.0)


@pytest.mark.parametrize("gradient", ["none", "statistic"])
def test_a_clip_under_a_scale_that_hears_its_statistic(gradient):
    x = torch.tensor([[-3.0, 0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    Quantizer(Quant(Uniform(4), scale=AbsMax(gradient=gradient), clip=1.0))(x).sum().backward()
    assert x.grad[0, 0] == 0 and x.grad[0, 1] == 1


TOKEN = Quant(Uniform(8), PerToken(), AbsMax())


def flowing(seed=0):
    """An activation: no leaf, with a graph."""
    leaf = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return leaf, leaf * 1.5


def test_one_tensor_is_quantized_once_for_all_who_quantize_it_alike():
    (leaf, x), (other, z) = flowing(), flowing()
    one, two = Quantizer(TOKEN), Quantizer(TOKEN.but(scale=AbsMax()))
    assert one(x) is two(x)
    assert torch.equal(one(x), one.quantize(x).dequantize())
    (3 * one(x) + two(x).square()).sum().backward()
    (3 * Quantizer(TOKEN)(z) + Quantizer(TOKEN)(z.clone()).square()).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert Quantizer(TOKEN.but(grid=Uniform(4)))(x) is not one(x)


def test_an_answer_does_not_outlive_its_tensor_or_its_truth():
    quantizer, (_, x) = Quantizer(TOKEN), flowing()
    first = quantizer(x)
    x.mul_(2)
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize()) and not torch.equal(quantizer(x), first)
    quantizer(x).add_(1)                                          # somebody writes into what was given
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())
    answer = weakref.ref(quantizer(x))
    del x
    gc.collect()
    assert answer() is None


@pytest.mark.parametrize("quant", [TOKEN.but(estimator=Clip()), TOKEN.but(clip=1.0), TOKEN.but(scale=AbsMax(gradient="statistic"))], ids=str)
def test_an_answer_that_saves_its_tensor_is_not_kept_on_it(quant):
    _, x = flowing()
    assert Quantizer(quant)(x) is not Quantizer(quant)(x)


def test_leaves_and_what_has_no_graph_keep_no_answer():
    quantizer, (leaf, x) = Quantizer(TOKEN), flowing()
    assert quantizer(leaf) is not quantizer(leaf)
    with torch.no_grad():
        assert quantizer(x) is not quantizer(x)
    quantizer.train().blend = 0.5
    assert quantizer(x) is not quantizer(x) and not torch.equal(quantizer(x), Quantizer(TOKEN)(x))
    assert not hasattr(leaf, "_quantized")


def test_nothing_is_saved_where_nothing_is_heard():
    saved = []
    _, x = flowing()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Quantizer(TOKEN)(x)
    assert not saved
