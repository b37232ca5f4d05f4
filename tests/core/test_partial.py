"""Partial: masks, and signs beside a finer grid: one formula for forward, hard and stored; gradients by their closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qatlas.core.error import QuantError
from qatlas.core.grain import PerTensor
from qatlas.core.noun import from_json
from qatlas.core.partial import Partial, largest, tails
from qatlas.core.qtensor import Masked
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
shares = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- masks -----------------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds, shares)
def test_the_largest_share_is_salient_and_ties_are_not(seed, share):
    v = draw(seed, 10, 20).abs()
    mask = largest(v, share)
    count = int(mask.sum())
    assert count == 200 if share == 1 else count in (max(200 - int(200 * (1 - share)) - 1, 0), 200 - int(200 * (1 - share)) - 1)
    if 0 < count < 200:
        assert v[mask].min() > v[~mask].max()
    assert not largest(torch.ones(3, 3), 0.5).any()


@few
@given(seeds, shares)
def test_tails_are_both_ends(seed, share):
    w = draw(seed, 10, 20)
    mask = tails(w, share)
    assert abs(int(mask.sum()) - 200 * share) <= 3
    if 0.1 <= share < 1:
        kept = w[~mask]
        assert (w[mask] > kept.max()).sum() + (w[mask] < kept.min()).sum() == mask.sum()


# ---- the quantizer ---------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds, shares, st.sampled_from(["magnitude", "tails"]))
def test_forward_hard_and_stored_are_one(seed, share, metric):
    x = draw(seed, 8, 24)
    quant = Partial(salient=share, metric=metric)
    quantizer = quant.build().initialise(x)
    q = quantizer.quantize(x)
    assert isinstance(q, Masked)
    for other in (quantizer.hard(x), quantizer(x), quantizer.known(x).value, quant.hard(x), quant.quantize(x).dequantize()):
        assert torch.equal(q.dequantize(), other)


@few
@given(seeds)
def test_salient_weights_hear_nothing_and_the_rest_a_times_g(seed):
    x, g = draw(seed, 6, 20, dtype=torch.float64), draw(seed + 1, 6, 20, dtype=torch.float64)
    quantizer = Partial(salient=0.2).build().initialise(x)
    latent = x.clone().requires_grad_()
    quantizer(latent).backward(g)
    rest = ~quantizer.mask
    a = (x.abs() * rest).sum(1, keepdim=True) / rest.sum(1, keepdim=True)
    torch.testing.assert_close(latent.grad, torch.where(rest, a * g, 0.0))
    assert (latent.grad[quantizer.mask] == 0).all()


@few
@given(seeds)
def test_the_step_is_the_least_squares_one(seed):
    x = draw(seed, 6, 20, dtype=torch.float64)
    quantizer = Partial(salient=0.3).build().initialise(x)
    rest, a = ~quantizer.mask, quantizer.step(x).requires_grad_()
    ((x - a * x.sign()).square() * rest).sum().backward()
    assert a.grad.abs().max() < 1e-9
    whole = Partial(salient=0.3, grain=PerTensor()).build().keep(x, quantizer.mask)
    torch.testing.assert_close(whole.step(x), x[rest].abs().mean().reshape(1, 1))


def test_salient_weights_keep_their_8_bits_whatever_becomes_of_the_master():
    layer = QLinear.of(nn.Linear(32, 8), Slots(Partial(salient=0.25)))
    mask, before = layer.weight_quantizer.mask, layer.hard()
    step = (layer.weight.amax(1, keepdim=True) - layer.weight.amin(1, keepdim=True)) / 255
    assert ((before - layer.weight).abs() * mask <= step * 0.51).all()
    with torch.no_grad():
        layer.weight.mul_(-0.5).add_(1.0)                         # decay, momentum, anything
    assert torch.equal(layer.hard()[mask], before[mask]) and not torch.equal(layer.hard()[~mask], before[~mask])
    assert (layer.hard()[~mask] > 0).all()


def test_no_and_all_salient_are_the_plain_methods():
    x = draw(0, 8, 32)
    signs, eight = Partial(salient=0.0).hard(x), Partial(salient=1.0).hard(x)
    torch.testing.assert_close(signs, x.abs().mean(1, keepdim=True) * torch.where(x < 0, -1.0, 1.0))
    assert torch.equal(eight, Partial().high.hard(x))


def test_what_a_quantizer_refuses():
    x = draw(0, 8, 32)
    with pytest.raises(QuantError, match="NaN"):
        Partial().build().initialise(x / 0 * 0)
    with pytest.raises(QuantError, match="no codes"):
        Partial(high=None).build().initialise(x).quantize(x)
    with pytest.raises(QuantError, match="adapter in the grid"):
        Partial().build().initialise(x)(x, shift=x)


def test_files_of_before_find_it_where_it_is_now():
    quant = Partial(salient=0.3)
    assert from_json(quant.to_json()) == from_json(quant.to_json() | {"is": "papers.pb_llm:Partial"}) == quant
