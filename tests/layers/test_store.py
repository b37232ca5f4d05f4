"""A Store's values, by blocks and by rows, are those of its QTensor bit for bit; what it looks up, it looks up as torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import Sign, Ternary, Uniform
from qatlas.core.qtensor import Masked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax
from qatlas.layers import store as module
from qatlas.layers.embedding import QEmbedding
from qatlas.layers.experts import QStack, Stack
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.layers.store import MaskedStore, Store, stored

QUANTS = {
    "by tensor": Quant(Uniform(4), PerTensor()), "by row": Quant(Uniform(3)), "by column": Quant(Uniform(4), PerChannel(-1)),
    "groups": Quant(Uniform(2), Group(8), AbsMax(dtype="float16")), "zeros": Quant(Uniform(4, False), Group(8), MinMax()),
    "offsets": Quant(Uniform(5, False), Group(8), MinMax("offset")), "tiles": Quant(Uniform(4), Block(3, 8)), "sign": Quant(Sign(), scale=AbsMean()),
    "ternary": Quant(Ternary(), Group(4), AbsMean()),
    "two levels": Quant(Uniform(4), Group(8), AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax()))),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_values_by_blocks_are_the_values(name: str, dtype: torch.dtype | None) -> None:
    held = stored(QUANTS[name].quantize(torch.randn(12, 24)))
    whole = held.qtensor().dequantize().detach()
    found = held.values(dtype)
    assert torch.equal(found, whole if dtype is None else whole.to(dtype)) and not found.requires_grad
    held.scale.data = held.scale.data.half() if isinstance(held.scale, nn.Parameter) and name == "groups" else getattr(held.scale, "data", None)
    assert torch.equal(held.values(), whole)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(QUANTS)), st.lists(st.integers(0, 11), max_size=6))
def test_rows_are_the_rows(name: str, at: list[int]) -> None:
    held = stored(QUANTS[name].quantize(torch.randn(12, 24)))
    found = held.rows(torch.tensor(at, dtype=torch.long))
    if found is None:
        assert name == "tiles" or not at
        return
    assert torch.equal(found.dequantize(), held.values()[at])


def test_what_has_no_rows_says_so() -> None:
    assert Store(Quant(Uniform(4), Group(8)).quantize(torch.randn(24))).rows(slice(0, 1)) is None
    one, other = (Quant(Uniform(bits)).quantize(torch.randn(6, 8)) for bits in (1, 8))
    held = MaskedStore.of(Masked(torch.rand(6, 8) < 0.3, one, other))
    assert held.rows(slice(0, 2)) is None and torch.equal(held.values(), held.qtensor().dequantize())
    assert held.values(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(set(QUANTS) - {"by column"}))
def test_a_look_up_dequantizes_its_rows_alone(name: str, monkeypatch: Any) -> None:
    trained = QEmbedding.of(nn.Embedding(12, 24, padding_idx=1), Slots(weight=QUANTS[name]))
    packed, ids = trained.pack(), torch.tensor([[3, 1], [11, 3]])
    with torch.no_grad():
        whole = packed.product(ids, packed.store.values())
        seen: list[int] = []
        unpacks = module.unpack_bits
        monkeypatch.setattr(module, "unpack_bits", lambda codes, bits, shape: (seen.append(shape[0]), unpacks(codes, bits, shape))[1])
        assert torch.equal(packed(ids), whole) and torch.equal(whole, trained(ids))
        assert name == "tiles" or seen[-1] == ids.numel()
        assert packed(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 24)
        assert torch.equal(packed(torch.arange(12)), packed.store.values()), "as many as there are: the whole table"
        for wrong in (12, -1):
            with pytest.raises(IndexError):
                packed(torch.tensor([wrong]))
    assert torch.equal(packed(ids), whole), "and with a graph"


def test_experts_without_tokens_are_not_dequantized(monkeypatch: Any) -> None:
    packed: Any = QStack.of(Stack(torch.randn(4 * 6, 8), 4), Slots(weight=QUANTS["groups"])).pack()
    x, sizes = torch.randn(5, 8), [2, 0, 3, 0]
    expected = packed(x, sizes).detach()                          # with a graph: the whole stack
    taken: list[slice] = []
    rows = Store.rows
    monkeypatch.setattr(Store, "rows", lambda self, at: (taken.append(at), rows(self, at))[1])
    with torch.no_grad():
        assert torch.equal(packed(x, sizes), expected)
        assert packed(x[:0], [0, 0, 0, 0]).shape == (0, 6)
    assert [at.start for at in taken if at != slice(0, 6)] == [12]


def test_one_weight_and_no_second_one_exists_in_floating_point() -> None:
    packed = QLinear.of(nn.Linear(256, 512), Slots(weight=QUANTS["groups"])).pack()
    x = torch.randn(1, 256)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        packed(x)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 4 * 512 * 256 <= peak < 1.2 * 4 * 512 * 256


def test_widening_is_idempotent_and_leaves_what_is_empty() -> None:
    held = Store(QUANTS["groups"].quantize(torch.randn(4, 8)))
    scale: Any = held.scale
    scale.data = scale.data.half()
    assert held.eval().scale.dtype == torch.float16 and held.train().scale.dtype == torch.float32 and held.scale is scale
    held.widen()
    assert held.scale.dtype == torch.float32
    with torch.device("meta"):
        empty = Store.from_meta(held.to_meta())
    empty.scale.data = empty.scale.data.half()
    assert empty.train().scale.dtype == torch.float16
