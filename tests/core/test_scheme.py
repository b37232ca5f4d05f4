"""Bit strings -> Quants."""

from __future__ import annotations

import pytest

from qatlas.core.error import QuantError
from qatlas.core.grain import Group, PerChannel, PerTensor, PerToken
from qatlas.core.grid import Sign, Ternary, Uniform
from qatlas.core.noun import from_json
from qatlas.core.scale import AbsMax, AbsMean, Learned
from qatlas.core.scheme import scheme, weight


@pytest.mark.parametrize(("text", "grid", "grain"), [
    ("w1", Sign(), PerChannel()), ("w1.58", Ternary(), PerChannel()), ("w2", Uniform(2), PerChannel()), ("w8", Uniform(8), PerChannel()),
    ("w4-g32", Uniform(4), Group(32)), ("w2a8-tensor", Uniform(2), PerTensor()), ("w1.58a8kv8-g128", Ternary(), Group(128)),
])
def test_weights(text: str, grid: object, grain: object) -> None:
    quant = scheme(text).weight
    assert quant.grid == grid and quant.grain == grain
    assert isinstance(quant.scale, AbsMean) if text.startswith("w1") else isinstance(quant.scale, Learned)
    assert quant.refit == (grid == Sign())


def test_inputs_and_cache() -> None:
    assert scheme("w4").input is None and scheme("w4").cache is None
    full = scheme("w4a8kv4-g32")
    assert full.input is not None and full.cache is not None
    assert (full.input.grid, full.input.grain, full.input.scale) == (Uniform(8), PerToken(), AbsMax())
    assert (full.cache.grid, full.cache.grain) == (Uniform(4), PerToken())
    static = scheme("w4a4-static").input
    assert static is not None and static.grid == Uniform(4, None) and static.grain == PerTensor() and static.scale.keeps == "parameter"


def test_a_scheme_goes_to_json_and_back() -> None:
    for text in ("w1", "w1.58a8", "w4a8kv8-g32", "w2a4-static-tensor", "w2a4-tensor-static"):
        assert from_json(scheme(text).to_json()) == scheme(text)


@pytest.mark.parametrize("text", ["", "4", "a8", "w", "wfour", "w4a", "w4-x", "w4 a8", "W4",
                                  "w4-g", "kv8w4", "w4-g0", "w4-g32-tensor", "w1.5.8", "w..", "w4-static-static"])
def test_another_form_is_refused_with_examples(text: str) -> None:
    with pytest.raises(QuantError, match=r"w<bits>.*for instance w4"):
        scheme(text)


@pytest.mark.parametrize("text", ["w0", "w9", "w3.5", "w1.6", "w32", "w4a0", "w4a17"])
def test_bits_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(QuantError):
        scheme(text)


def test_weight_alone() -> None:
    assert weight(4).grain == PerChannel() and weight("1.58", Group(8)).grain == Group(8)
    with pytest.raises(QuantError, match="1, 1.58 or 2 to 8"):
        weight(16)


def test_static_without_activations_is_refused() -> None:
    with pytest.raises(QuantError, match="-static, which is of activations"):
        scheme("w4-static")
