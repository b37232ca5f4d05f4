"""Tokens of two widths: who is narrow, what reads it, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quantizer
from qatlas.core.scale import AbsMean, Learned
from qatlas.layers.attention import fitted
from qatlas.layers.tokens import MARKS, Marks, Mixed, Sorted, first_score

WIDE = Mixed(Uniform(8), PerTensor(), Learned(AbsMean(2.0, per_root=True), over="tensor"), Clip(), low=4)
seeds = st.integers(0, 2**31)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(scores):
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def sorting(scores, **more):
    watch = Sorted(**more).build()
    watch.observe()
    watch(scores)
    watch.settle()
    return watch


def mixing(x):
    quantizer = WIDE.build()
    for part in (quantizer, quantizer.low):
        part.initialise(x)
    return quantizer


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(0, 1))
def test_in_training_the_rank_decides_row_by_row(seed, share):
    scores = causal(draw(seed, 3, 2, 9, 9))
    watch = sorting(scores, share=share).train()
    assert watch(scores) is scores
    low, k = MARKS.get().low, math.floor(share * 9)
    score = scores[..., 0].mean(1)
    assert (low.sum(1) == k).all()
    for row, marked in zip(score, low, strict=True):
        assert k in (0, 9) or row[marked].max() <= row[~marked].min()
    alone = torch.cat([watch(scores[i : i + 1]) is not None and MARKS.get().low for i in range(3)])
    assert torch.equal(alone, low), "rows do not move each other"


def test_outside_of_training_a_threshold_decides_and_the_future_does_not():
    scores = causal(draw(0, 2, 2, 8, 8))
    watch = sorting(scores).eval()
    watch(scores)
    low = MARKS.get().low
    assert torch.equal(low, scores[..., 0].mean(1) < watch.threshold) and 0 < low.sum() < low.numel()
    other = scores.clone()
    other[:, :, 5:, :] = causal(draw(1, 2, 2, 8, 8))[:, :, 5:, :]
    watch(other)
    assert torch.equal(MARKS.get().low[:, :5], low[:, :5])


def test_the_threshold_is_between_the_two_and_follows_only_steps_that_learn():
    score = torch.tensor([[5.0, 1.0, 3.0, 2.0]])
    scores = causal(score[:, None, :, None].expand(1, 2, 4, 4).clone())
    watch = sorting(scores, momentum=0.5)
    assert watch.threshold == 2.5
    up = (causal(2 * score[:, None, :, None].expand(1, 2, 4, 4).clone())).requires_grad_()
    watch.train()(up.detach())
    watch.eval()(up)
    assert watch.threshold == 2.5
    watch.train()(up)
    assert watch.threshold == 3.75                                # half way to 5
    for share, wanted in ((0.0, -math.inf), (0.2, -math.inf), (1.0, math.inf)):
        watch = sorting(scores, share=share)
        watch.train()(up)
        assert watch.threshold == wanted, "no token, or all: nothing is mixed"
        watch.eval()(scores)
        assert MARKS.get().low.all() == (share == 1.0) and MARKS.get().low.any() == (share == 1.0)


def test_the_first_token_is_the_first_that_any_token_sees():
    scores = causal(draw(0, 2, 3, 6, 6))
    padded = scores.clone()
    padded[1, :, :, :2] = torch.finfo(scores.dtype).min           # two tokens of padding on the left
    found = first_score(padded)
    assert torch.equal(found[0], scores[0, :, :, 0].mean(0)) and torch.equal(found[1, 2:], scores[1, :, 2:, 2].mean(0))
    whole = first_score(scores.masked_fill(scores < -1e30, -math.inf))
    torch.testing.assert_close(whole, first_score(scores))


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_each_token_has_its_grid_and_its_gradients(seed):
    x, g = draw(seed, 2, 6, 5), draw(seed + 1, 2, 6, 5)
    quantizer, low = mixing(x), draw(seed + 2, 2, 6) > 0
    MARKS.set(Marks(low, 6))
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(g)
    narrow, wide = quantizer.low.hard(x), Quantizer.forward(quantizer, x).detach()
    assert torch.equal(y.detach(), torch.where(low[..., None], narrow, wide)) and torch.equal(quantizer.hard(x), y.detach())
    assert y.detach()[low].unique().numel() <= 16
    assert (quantizer.low.scale.grad == 0).all() == (not low.any()) or low.all()
    for part, where in ((quantizer.low, low), (quantizer, ~low)):  # each hears its tokens only
        alone = Quantizer(part.quant)
        alone.load_state_dict({"scale": part.scale.detach()})
        other = x.clone().requires_grad_()
        alone(other).backward(g * where[..., None])
        torch.testing.assert_close(part.scale.grad, alone.scale.grad)
        torch.testing.assert_close(leaf.grad[where], other.grad[where])


def test_it_reads_inputs_and_heads_and_the_cache_alike():
    x, heads = draw(0, 2, 4, 5), draw(1, 2, 3, 4, 5)
    low = torch.tensor([[True, False, True, False], [False, False, True, True]])
    MARKS.set(Marks(low, 4))
    quantizer = mixing(heads)
    whole = quantizer(heads)
    assert torch.equal(whole[0, :, 0], quantizer.low.hard(heads)[0, :, 0]) and not torch.equal(whole[0, :, 1], quantizer.low.hard(heads)[0, :, 1])
    assert mixing(x)(x).shape == x.shape
    MARKS.set(Marks(low, 1))                                      # one new token, keys of four
    assert torch.equal(quantizer(heads), whole) and torch.equal(quantizer(heads[:, :, 3:]), whole[:, :, 3:])


def test_a_cache_goes_on_with_what_is_remembered_and_others_are_refused():
    scores, keys = causal(draw(0, 2, 2, 6, 6)), draw(1, 2, 3, 6, 5)
    watch, quantizer = sorting(scores).eval(), mixing(keys).eval()
    watch(scores)
    whole, values = MARKS.get().low, quantizer(keys)
    watch(scores[:, :, :4, :4])
    quantizer(keys[:, :, :4])
    watch(scores[:, :, 4:5, :5])
    assert torch.equal(MARKS.get().low, whole[:, :5]) and torch.equal(quantizer(keys[:, :, :5]), values[:, :, :5])
    watch(scores[:, :, 5:, :])
    moved = keys.flip(0)
    with pytest.raises(QuantError, match="moved, as beam search"):
        quantizer(moved)
    for wrong in (scores[:, :, 5:, :], scores[:1, :, 5:, :]):     # a token that was there already; other rows
        with pytest.raises(QuantError, match="whose bits are not known"):
            watch(wrong)
    with pytest.raises(QuantError, match="none remembered"):
        sorting(scores).eval()(scores[:, :, 5:, :])


def test_what_cannot_be_known_is_refused():
    x = draw(0, 2, 4, 5)
    quantizer = mixing(x)
    MARKS.set(None)
    with pytest.raises(QuantError, match="no attention has run"):
        quantizer(x)
    for low, new in ((torch.zeros(2, 3, dtype=torch.bool), 3), (torch.zeros(1, 4, dtype=torch.bool), 4)):
        MARKS.set(Marks(low, new))
        with pytest.raises(QuantError, match="the last attention marked"):
            quantizer(x)
    with pytest.raises(QuantError, match="no single QTensor"):
        quantizer.quantize(x)
    with pytest.raises(QuantError, match="not calibrated"):
        Sorted().build()(causal(draw(0, 1, 1, 3, 3)))
    with pytest.raises(QuantError, match="scores has no quantizer"):
        fitted("scores", WIDE)


def test_off_it_passes_everything_and_says_nothing():
    x, scores = draw(0, 2, 4, 5), causal(draw(0, 2, 2, 4, 4))
    MARKS.set(None)
    for quantizer, value in ((mixing(x), x), (sorting(scores), scores)):
        quantizer.on = False
        assert quantizer(value) is value and MARKS.get() is None


def test_a_recomputed_block_is_refused():
    from torch.utils.checkpoint import checkpoint

    scores = causal(draw(0, 2, 2, 4, 4)).requires_grad_()
    watch = sorting(scores.detach()).train()
    y = checkpoint(lambda s: watch(s).sigmoid(), scores, use_reentrant=False)
    with pytest.raises(QuantError, match="gradient checkpointing"):
        y.sum().backward()


@pytest.mark.parametrize("quant", [WIDE, Sorted(share=0.25), WIDE.but(grid=Uniform(8, False))], ids=lambda q: type(q).__name__)
def test_they_are_nouns_and_their_state_comes_back(quant):
    assert from_json(quant.to_json()) == quant and not quant.plain and quant.label
    built, again = quant.build(), from_json(quant.to_json()).build()
    if isinstance(quant, Mixed):
        built.initialise(torch.ones(3))
        built.low.initialise(torch.ones(3))
    else:
        built.threshold.fill_(0.5)
    again.load_state_dict(built.state_dict())
    assert again.ready and all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), again.state_dict().values(), strict=True))
