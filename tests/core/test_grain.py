"""Grains: the view and its inverse, the shape of the scales, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import QuantError
from qatlas.core.grain import Block, Grain, Group, PerChannel, PerTensor, PerToken, Scattered
from qatlas.core.noun import from_json

shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(lambda s: [4 * s[0], *s[1:], 8])
FITTING = [PerTensor(), PerChannel(), PerChannel(-1), PerChannel(1), PerToken(), Group(4), Group(8), Block(2, 4), Block(4, 8),
           Scattered(4), Scattered(8)]


@pytest.mark.parametrize("grain", FITTING, ids=str)
@settings(max_examples=25, deadline=None)
@given(shapes)
def test_back_undoes_view(grain: Grain, shape: list[int]) -> None:
    x = torch.randn(shape)
    view = grain.view(x)
    assert torch.equal(grain.back(view, x.shape), x)
    assert grain.scale_shape(x.shape) == tuple(view.shape[:-1])
    assert torch.equal(view.flatten().sort().values, x.flatten().sort().values)


def test_each_grain_shares_what_it_says() -> None:
    x = torch.arange(24.0).reshape(4, 6)
    assert PerTensor().view(x).shape == (1, 24)
    assert torch.equal(PerChannel().view(x), x)
    assert torch.equal(PerChannel(-1).view(x), x.T)
    assert torch.equal(PerToken().view(x), x)
    assert Group(3).view(x)[1, 0].tolist() == [6, 7, 8]
    assert Scattered(3, (5, 0, 3, 1, 2, 4)).view(x)[1].tolist() == [[11, 6, 9], [7, 8, 10]]
    assert Block(2, 3).view(x)[0, 1].tolist() == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize(("grain", "shape", "scales"), [
    (PerTensor(), (4, 6), (1,)), (PerChannel(), (4, 6), (4,)), (PerChannel(-1), (2, 3, 6), (6,)), (PerToken(), (2, 3, 6), (2, 3)),
    (Group(3), (4, 6), (4, 2)), (Block(2, 3), (4, 6), (2, 2)), (Group(4), (5, 3, 2, 2), (5, 3)), (PerChannel(), (5, 3, 2, 2), (5,)),
    (Group(4), (8,), (1, 2)), (Scattered(4, tuple(range(12))), (5, 3, 2, 2), (5, 3)), (PerTensor(), (3,), (1,)),
])
def test_shapes_of_scales(grain: Grain, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    assert grain.scale_shape(shape) == scales


@pytest.mark.parametrize("grain", FITTING, ids=str)
@pytest.mark.parametrize("at", [slice(4, 12), torch.tensor([11, 4, 4])], ids=["neighbours", "picked"])
def test_rows_keep_their_scales(grain: Grain, at: Any) -> None:
    x = torch.randn(12, 8)
    view = grain.view(x)
    steps = torch.rand(view.shape[:-1])
    whole = grain.back(view * steps[..., None], x.shape)
    mine = grain.of_rows(steps, at)
    if mine is None:
        assert isinstance(grain, Block)
        return
    assert torch.equal(grain.back(grain.view(x[at]) * mine[..., None], x[at].shape), whole[at])


def test_rows_that_share_a_scale_with_others_are_not_told_apart() -> None:
    assert Block(4, 8).of_rows(torch.ones(3, 1), slice(2, 6)) is None and PerChannel(-2).of_rows(torch.ones(3), slice(0, 1)) is None
    assert Block(4, 8).tall == 4 and Group(8).tall == 1


def test_a_convolution_is_grouped_over_its_whole_fan_in() -> None:
    w = torch.randn(4, 3, 2, 2)
    assert torch.equal(Group(6).view(w), w.reshape(4, 2, 6))
    assert torch.equal(Block(2, 6).back(Block(2, 6).view(w), w.shape), w)


def test_a_group_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(QuantError, match=r"group of 128 does not divide the 96 inputs.*16, 32"):
        Group(128).view(torch.empty(4, 96))
    with pytest.raises(QuantError, match="take per channel"):
        Group(4).view(torch.empty(4, 7))
    with pytest.raises(QuantError, match="do not tile"):
        Block(3, 2).view(torch.empty(4, 6))
    with pytest.raises(QuantError):
        Group(0).view(torch.empty(4, 6))


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)), st.sampled_from([2, 3, 6]), st.sampled_from([(4, 12), (5, 3, 2, 2), (12,)]))
def test_any_order_comes_back(order: list[int], size: int, shape: tuple[int, ...]) -> None:
    grain, x = Scattered(size, tuple(order)), torch.randn(shape)
    assert torch.equal(grain.back(grain.view(x), shape), x) and grain.scale_shape(shape) == tuple(grain.view(x).shape[:-1])
    flat = x.reshape(-1, 12) if x.dim() > 1 else x.reshape(1, 12)
    assert torch.equal(grain.view(x)[0, 1], flat[0, order[size : 2 * size]])
    assert from_json(json.loads(json.dumps(grain.to_json()))) == grain


def test_an_order_that_is_none_is_refused() -> None:
    for order in ((0, 0, 1), (1, 2, 3), (0.0, 1.0), ("a",)):
        with pytest.raises(QuantError, match="each of the inputs"):
            Scattered(2, order)
    with pytest.raises(QuantError, match="an order of 4 inputs cannot group the 6 inputs"):
        Scattered(2, (3, 1, 2, 0)).view(torch.empty(3, 6))
