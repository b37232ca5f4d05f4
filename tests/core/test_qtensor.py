"""QTensor: packing against a bit stream of plain Python, tensors and meta back and forth, composites."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.error import CheckpointError, QuantError
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import Masked, QTensor, Stacked, pack_bits, unpack_bits
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax


def stream(codes: list[int], bits: int) -> list[int]:
    """The row as one whole number: element i at bit i * bits; then cut into bytes, the lowest first."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 40), st.data())
def test_packing_is_a_bit_stream(bits: int, rows: int, n: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n), min_size=rows, max_size=rows))
    packed = pack_bits(torch.tensor(codes), bits)
    assert packed.tolist() == [stream(row, bits) for row in codes]
    assert unpack_bits(packed, bits, (rows, n)).tolist() == codes


def test_packing_keeps_leading_axes_and_takes_a_single_code() -> None:
    codes = torch.randint(0, 8, (2, 3, 5))
    assert pack_bits(codes, 3).shape == (2, 3, 2)
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, (2, 3, 5)), codes.to(torch.uint8))
    assert unpack_bits(pack_bits(torch.tensor(5), 3), 3, ()).item() == 5


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(QuantError, match="1 to 8 bits"):
        pack_bits(torch.tensor([1]), bits)


def test_bytes_of_another_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be 3-bit codes"):
        unpack_bits(torch.zeros(2, 4, dtype=torch.uint8), 3, (2, 12))


QUANTS = [
    Quant(Uniform(3)), Quant(Uniform(4, False), scale=MinMax()), Quant(Uniform(4, False), Group(8), MinMax("offset")),
    Quant(Ternary(), PerTensor(), AbsMean()),
    Quant(Sign(), scale=AbsMean(), refit=True), Quant(HalfStep(2)), Quant(Stretched(3)), Quant(Uniform(4), Group(8), AbsMax(dtype="float16")),
    Quant(Uniform(4), Group(4), AbsMax(dtype="float8_e4m3fn")), Quant(Uniform(4), Group(4), AbsMax(dtype="float8_e8m0fnu")),
    Quant(Uniform(4, False), Group(4), MinMax("offset", dtype="float16", offset_dtype="float16")),
    Quant(Uniform(4, False), Group(4), MinMax("offset", nested=Quant(Uniform(6, False), Group(2), AbsMax(dtype="float16")),
                                              offset_nested=Quant(Uniform(6, False), Group(2), AbsMax(dtype="float16")))),
    Quant(Uniform(4), Group(4), AbsMax(nested=Quant(Uniform(6, False), Group(2), AbsMax(dtype="float16")))),
]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: f"{q.grid}-{q.scale.dtype}-{q.grain}{'-nested' * (q.scale.nested is not None)}")
def test_tensors_and_meta_give_the_same_tensor_back(quant: Quant) -> None:
    stored = quant.quantize(torch.randn(6, 16))
    again = QTensor.of(stored.to_tensors(), json.loads(json.dumps(stored.to_meta())))
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert torch.equal(again.codes, stored.codes) and again.grid == stored.grid and again.grain == stored.grain
    assert stored.nbytes() == sum(t.numel() * t.element_size() for t in stored.to_tensors().values())
    assert stored.shape == (6, 16) and stored.dequantize().dtype == torch.float32


def test_the_stored_scale_has_its_type() -> None:
    stored = Quant(Uniform(4), Group(4), AbsMax(dtype="float8_e4m3fn")).quantize(torch.randn(2, 8))
    assert stored.to_tensors()["scale"].dtype == torch.float8_e4m3fn
    assert stored.nbytes() == 2 * 4 + 2 * 2


def test_a_missing_tensor_is_named() -> None:
    stored = Quant(Uniform(4)).quantize(torch.randn(2, 8))
    tensors = stored.to_tensors()
    del tensors["codes"]
    with pytest.raises(CheckpointError, match=r"lacks 'codes'; found scale"):
        QTensor.of(tensors, stored.to_meta())


def test_zero_and_offset_exclude_each_other() -> None:
    one = torch.ones(2)
    with pytest.raises(QuantError, match="not both"):
        QTensor(torch.zeros(2, 4, dtype=torch.uint8), one, one, one, Uniform(4), PerChannel())


def test_composites() -> None:
    x = torch.randn(4, 8)
    low, high = Quant(Sign(), scale=AbsMean()).quantize(x), Quant(Uniform(8)).quantize(x)
    mask = x.abs() > 1
    mixed = Masked(mask, high, low).dequantize()
    assert torch.equal(mixed[mask], high.dequantize()[mask]) and torch.equal(mixed[~mask], low.dequantize()[~mask])
    n = int(mask.sum())                                           # each part's codes where they are taken, the steps of both (fp32), the mask in bits
    assert Masked(mask, high, low).nbytes() == n + -(-(32 - n) // 8) + 4 * 4 + 4 * 4 + 4
    rest = Quant(Sign(), scale=AbsMean()).quantize(x - low.dequantize())
    total = Stacked([low, rest])
    assert torch.equal(total.dequantize(), low.dequantize() + rest.dequantize())
    assert total.nbytes() == low.nbytes() + rest.nbytes()
