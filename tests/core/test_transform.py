"""Transforms: inner products stay, `back` inverts, Hadamard matrices are Hadamard matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import QuantError
from qatlas.core.transform import Chain, Hadamard, Permute, Smooth, Transform

TRANSFORMS = [
    Hadamard(), Hadamard(seed=3), Hadamard(block=4), Hadamard(block=12, seed=1), Hadamard(most=128), Hadamard(most=4),
    Smooth(), Smooth(0.0), Smooth(1.0), Permute(), Chain(),
    Chain((Smooth(), Permute(), Hadamard(seed=2))), Chain((Permute(), Hadamard(block=4), Smooth(0.7))), Chain((Hadamard(), Chain((Permute(),)))),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_inner_products_stay_and_back_inverts(transform: Transform, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, 3, 24, generator=random, dtype=torch.float64), torch.randn(5, 24, generator=random, dtype=torch.float64)
    maps = transform.build(w, x.abs().amax((0, 1)))
    torch.testing.assert_close(maps.of_input(x) @ maps.of_weight(w).T, x @ w.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(maps.back(maps.of_weight(w)), w, rtol=1e-10, atol=1e-10)
    assert transform.needs_peak == ("Smooth" in str(transform) or "Permute" in str(transform))


@pytest.mark.parametrize("n", [3, 6, 10, 22, 92])
def test_orders_without_a_matrix_are_refused(n: int) -> None:
    with pytest.raises(QuantError, match=rf"order {n} can be made; take Hadamard\(block={n & -n}\)"):
        Hadamard().build(torch.empty(4, n))


def test_what_a_transform_needs_is_said() -> None:
    for transform in (Smooth(), Permute(), Chain((Permute(),))):
        with pytest.raises(QuantError, match=r"max\|x\|"):
            transform.build(torch.ones(2, 4))
    with pytest.raises(QuantError, match="does not divide"):
        Hadamard(block=5).build(torch.ones(2, 8))


def test_a_seed_is_a_seed_and_is_stored() -> None:
    w = torch.randn(2, 16)
    one, same, other = (Hadamard(seed=s).build(w) for s in (1, 1, 2))
    assert torch.equal(one.of_input(w), same.of_input(w)) and not torch.equal(one.of_input(w), other.of_input(w))
    assert one.state_dict()["signs"].shape == (16,)


def test_smooth_shares_the_difficulty() -> None:
    """s = max|x|^a / max|w|^(1-a) (SmoothQuant): with a = 0.5 both sides end with the same maxima, with 1 the input's are all 1."""
    w, peak = torch.tensor([[1.0, 4.0], [-2.0, 1.0]]), torch.tensor([8.0, 1.0])
    maps = Smooth(0.5).build(w, peak)
    torch.testing.assert_close(maps.of_input(peak[None])[0], maps.of_weight(w).abs().amax(0))
    torch.testing.assert_close(Smooth(1.0).build(w, peak).of_input(peak[None]), torch.ones(1, 2))
    assert Smooth().build(torch.zeros(2, 2), torch.zeros(2)).of_weight(torch.zeros(2, 2)).isfinite().all()


def test_permute_puts_the_heavy_channels_first() -> None:
    maps = Permute().build(torch.ones(1, 3), torch.tensor([1.0, 9.0, 5.0]))
    assert maps.of_input(torch.tensor([1.0, 9.0, 5.0])).tolist() == [9, 5, 1]


@pytest.mark.parametrize(("n", "most", "block"), [(256, 128, 128), (64, 128, 64), (24, 128, 8), (172, 128, 4), (24, 2, 2)])
def test_most_is_the_largest_power_of_two_that_divides(n: int, most: int, block: int) -> None:
    x = torch.randn(3, n)
    assert torch.equal(Hadamard(most=most).build(x).of_input(x), Hadamard(block=block).build(x).of_input(x))


@pytest.mark.parametrize(("fields", "words"), [({"most": 12}, "power of two"), ({"most": 1}, "power of two"),
                                              ({"most": 4, "block": 4}, "in place of")])
def test_a_most_that_says_nothing_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(QuantError, match=words):
        Hadamard(**fields)


def test_an_odd_width_is_refused_rather_than_left_alone() -> None:
    with pytest.raises(QuantError, match="rotates nothing of a layer with 9 inputs"):
        Hadamard(most=128).build(torch.ones(2, 9))


def test_layers_that_read_one_tensor_rotate_it_once() -> None:
    root = torch.randn(4, 32, requires_grad=True)
    x, maps, other = root * 1, [Hadamard(block=16).build(torch.ones(2, 32)) for _ in range(2)], Hadamard(block=8).build(torch.ones(2, 32))
    first = maps[0].of_input(x)
    assert maps[1].of_input(x) is first and other.of_input(x) is not first
    assert torch.equal(maps[0].of_input(x), first) and maps[0].of_input(root) is not maps[0].of_input(root), "a leaf lives on and holds nothing"
    (maps[0].of_input(x).sum() + 2 * maps[1].of_input(x).sum()).backward()
    torch.testing.assert_close(root.grad, 3 * maps[0].of_input(torch.ones(4, 32)))


@torch.no_grad()
def test_a_rotation_is_forgotten_when_the_tensor_is_written() -> None:
    with torch.enable_grad():
        x = torch.randn(4, 32, requires_grad=True) * 1
        maps = Hadamard(block=16).build(torch.ones(2, 32))
        maps.of_input(x)
    x.add_(1)
    torch.testing.assert_close(maps.of_input(x), maps.of_weight(x), rtol=0, atol=0)


def test_signs_are_not_shared() -> None:
    x = torch.randn(4, 32, requires_grad=True) * 1
    one, other = (Hadamard(seed=seed).build(torch.ones(2, 32)).of_input(x) for seed in (1, 2))
    assert not torch.equal(one, other)
