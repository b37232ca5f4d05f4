from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grain import Group, PerChannel, PerTensor, PerToken
from qatlas.core.grid import HalfStep, Ternary, Uniform
from qatlas.core.qtensor import Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.export.checkpoint import Signal
from qatlas.export.onnx import TARGETS, fit, why_not, why_not_signal
from qatlas.export.onnx.fitting import BITS, kind

STATIC = scheme("w4a8-static").input


@given(st.sampled_from([Uniform(b, s) for b in range(1, 9) for s in (True, False)] + [HalfStep(b) for b in (2, 3, 4, 7)] + [Ternary(), Float(2, 1)]),
       st.sampled_from(sorted(BITS)))
def test_a_kind_holds_every_value(grid, target):
    found = kind(grid, target, torch.empty(0))
    low, high = (-(2 ** (found.bits - 1)), 2 ** (found.bits - 1) - 1) if found.signed else (0, 2**found.bits - 1)
    v = grid.values() * found.times
    assert torch.equal(v, v.round()) and v.min() >= low and v.max() <= high and found.bits in BITS[target]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_holds_what_it_would_choose_itself(target):
    assert fit(TARGETS[target], target, (8, 64)) == TARGETS[target]
    assert why_not(TARGETS[target].quantize(torch.randn(8, 64)), target) is None


@pytest.mark.parametrize("quant, words", [
    (Quant(Uniform(4), scale=MinMax(zero="offset")), "float offset"), (Quant(Uniform(12)), "12 bits"), (Quant(Uniform(4, None)), "signed=True"),
    (Quant(Float(4, 3)), "not integers of 8 bits"), (Quant(HalfStep(8)), "not integers of 8 bits"),
    (Quant(Uniform(4), Group(48)), "does not divide")])
def test_refusals_name_the_reason_and_the_scheme(quant, words):
    assert words in why_not(quant, "int4", (8, 64))
    with pytest.raises(FormatError, match="nearest scheme for onnx:int4: w4-g32"):
        fit(quant, "int4", (8, 64))


def test_a_composite_has_no_place():
    part = Quant(Uniform(4)).quantize(torch.randn(4, 8))
    assert "several parts" in why_not(Stacked((part, part)), "int8", (4, 8))


def test_a_step_too_small_to_be_halved():
    tensor = Quant(HalfStep(2)).quantize(torch.randn(4, 8))
    assert why_not(tensor, "int4") is None
    tensor.scale[0] = 2.0**-126
    assert "no exact fp32 number" in why_not(tensor, "int4")


@pytest.mark.parametrize("quant, words", [
    (scheme("w4a8").input, "each token a step of its own"), (Quant(Uniform(8), PerTensor(), AbsMax()), "each input a step of its own"),
    (STATIC.but(grid=Ternary()), "integer grid"), (STATIC.but(grain=PerChannel(0)), "each sample"), (STATIC.but(grain=Group(32)), "Group"),
    (STATIC.but(grain=PerChannel(1), grid=Uniform(4)), "Clip"), (Quant(Uniform(8), PerToken(), AbsMax()), "each token")])
def test_activations_that_have_no_place(quant, words):
    assert words in why_not_signal(quant, "int8") and why_not_signal(quant, "int8-weights") is None


def test_a_signal_is_judged_by_what_it_became():
    assert why_not_signal(STATIC, "int8") is None
    assert "never calibrated" in why_not_signal(Signal(STATIC, torch.ones(1)), "int8")
    settled = STATIC.but(grid=Uniform(8, False), scale=Learned(MinMax(zero="offset")))
    assert "offset" in why_not_signal(Signal(settled, torch.ones(1), offset=torch.ones(1)), "int8")


@pytest.mark.parametrize("ask", [lambda: fit(weight(4), "int3", (8, 8)), lambda: why_not(weight(4), "int3", (8, 8)),
                                 lambda: why_not_signal(STATIC, "int3")])
def test_an_unknown_target(ask):
    with pytest.raises(FormatError, match="onnx:int"):
        ask()
