"""What XNNPACK holds, what it does not and why; none of it needs the package."""

from __future__ import annotations

import pytest
import torch

from qatlas.core.error import FormatError
from qatlas.core.grain import Block, Group, PerChannel, PerTensor, PerToken
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.qtensor import Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax
from qatlas.core.scheme import scheme
from qatlas.export import executorch as form
from qatlas.export.checkpoint import Checkpoint
from qatlas.export.executorch import TARGETS, fit, fit_input, why_not
from qatlas.export.executorch.fitting import IMAGE, INPUT, bits
from qatlas.export.executorch.lower import laid
from qatlas.model.exportable import can_export

W = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_holds_what_it_would_choose_itself(target):
    assert fit(TARGETS[target], target, (12, 96)) == TARGETS[target]


@pytest.mark.parametrize("quant, dtype", [(Quant(Uniform(4), Group(32)), "bfloat16"), (Quant(Uniform(4), Group(96)), "float32"),
                                          (Quant(Uniform(4)), "float32"), (Quant(Uniform(4), Group(32), AbsMax(dtype="float16")), "bfloat16"),
                                          (Quant(Uniform(4), Group(32), AbsMax(dtype="float8_e8m0fnu")), "float8_e8m0fnu")])
def test_steps_of_groups_become_bf16_and_those_of_channels_stay(quant, dtype):
    moved = fit(quant, "int4", (12, 96))
    assert moved.scale.dtype == dtype and moved.but(scale=quant.scale) == quant
    assert why_not(moved.quantize(W), "int4") is None


@pytest.mark.parametrize("quant", [Quant(Uniform(2)), Quant(Ternary(), scale=AbsMean()), Quant(Sign(), PerTensor(), AbsMean(), refit=True),
                                   Quant(HalfStep(2), PerChannel()), Quant(Uniform(3, narrow=True)), Quant(Uniform(4), Block(2, 32)),
                                   Quant(Uniform(4), scale=Learned(AbsMax()))], ids=str)
def test_codes_and_steps_are_the_values_bit_for_bit(quant):
    quant = fit(quant, "int4", (12, 96))
    q = quant.quantize(W)
    codes, steps, wide, size = laid(q, "int4")
    assert wide == 4 and codes.dtype == torch.int8 and int(codes.abs().max()) <= 8
    assert torch.equal(codes.float() * steps.reshape(12, -1).repeat_interleave(size or 96, 1), q.dequantize())


@pytest.mark.parametrize("quant, target, words", [
    (Quant(Uniform(4), Group(16)), "int4", "no multiple of 32"),
    (Quant(Uniform(8), Group(32)), "int4", "4 bits alone"), (Quant(Uniform(8), Group(32)), "int8", "4 bits alone"),
    (Quant(Uniform(4), Group(32)), "int8", "4 bits alone"),
    (Quant(Uniform(8, False)), "int4", "do not lie around zero"), (Quant(Uniform(4), scale=MinMax()), "int4", "zero point"),
    (Quant(Uniform(4), scale=MinMax(zero="offset")), "int4", "zero point"),
    (Quant(Uniform(9)), "int8", "no integers of 8 bits"), (Quant(Uniform(4, None)), "int4", "settled"),
    (Quant(Uniform(4), PerChannel(1)), "int4", "groups of 1 are no multiple"), (Quant(Uniform(4), Group(36)), "int4", "does not divide"),
    (Quant(Uniform(4), scale=AbsMax(sign="free")), "int4", "positive"),
    (Quant(Uniform(4), Group(32), AbsMax(nested=Quant(Uniform(6, False), PerTensor()))), "int4", "themselves quantized")], ids=str)
def test_refused_with_the_reason_and_what_can(quant, target, words):
    with pytest.raises(FormatError, match=words) as refused:
        fit(quant, target, (12, 96))
    assert f"executorch:{target} cannot hold" in str(refused.value) and "nearest scheme for" in str(refused.value)


@pytest.mark.parametrize("grain", [PerChannel(), PerTensor()])
@pytest.mark.parametrize("grid", [Uniform(8), Uniform(4), Ternary()])
def test_a_convolution_takes_8_bits_and_one_step_a_channel(grid, grain):
    w = torch.randn(6, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    q = fit(Quant(grid, grain), "int4", (6, 5, 3, 2)).quantize(w)
    codes, steps, wide, size = laid(q, "int4")
    assert (wide, size, steps.shape) == (8, 0, (6,)) and torch.equal(codes.float() * steps.reshape(6, 1, 1, 1), q.dequantize())
    assert "one a channel" in why_not(Quant(grid, Group(5)), "int8", w.shape) and "no group" in why_not(Quant(grid, PerChannel(1)), "int8", w.shape)


def test_a_convolution_wants_one_place_for_each_image():
    given = IMAGE.but(scale=AbsMax())
    assert fit_input(given, "int8", object(), (6, 5, 3, 3), "Conv2d") == IMAGE
    with pytest.raises(FormatError, match="each image in front of a convolution"):
        fit_input(INPUT, "int8", object(), (6, 5, 3, 3), "Conv2d")


def test_other_shapes_and_a_composite_are_refused():
    assert "only matrices" in why_not(Quant(Uniform(8)), "int8", (8, 3, 3))
    q = Quant(Uniform(4)).quantize(W)
    assert "several parts" in why_not(Stacked([q, q]), "int4", (12, 96))


@pytest.mark.parametrize("change, words", [(lambda q: q.scale.mul_(-1), "no positive normal"), (lambda q: q.scale.mul_(1e-42), "no positive normal"),
                                           (lambda q: q.scale.mul_(1 + 2**-12), "are bf16, and some of these are not")])
def test_values_are_judged_too(change, words):
    q = fit(Quant(Uniform(4), Group(32)), "int4", (12, 96)).quantize(W)
    assert why_not(q, "int4") is None
    change(q)
    assert words in why_not(q, "int4")


def test_a_grid_from_zero_lies_in_more_bits():
    assert bits(Quant(Uniform(4, False)), "int4") == 8 and why_not(Quant(Uniform(4, False)), "int4", (8, 64)) is None


def test_bits_are_the_fewest_that_the_target_has():
    assert bits(Quant(Uniform(8)), "int4") == 8 and bits(Quant(Uniform(3)), "int4") == 4 and bits(Quant(Uniform(3)), "int8") == 8
    assert bits(Quant(Uniform(8)).quantize(W), "int4") == 8


def test_an_input_of_a_token_gets_the_zero_that_the_engine_gives_it():
    given = scheme("w4a8").input
    assert fit_input(given, "int4", object(), (12, 96), "Linear") == INPUT == given.but(scale=MinMax())
    assert fit_input(None, "int4", None, (12, 96), "Linear") is None


@pytest.mark.parametrize("entry, held, module, words", [
    (None, True, "Linear", "in full precision, and XNNPACK"), (INPUT, False, "Linear", "before a weight in full precision"),
    (INPUT, True, "Conv1d", "nn.Conv2d alone"), (INPUT, True, "Embedding", "nn.Conv2d alone"),
    (scheme("w4a8-static").input, True, "Linear", "each token"), (INPUT.but(grid=Uniform(4)), True, "Linear", "each token"),
    (Quant(Uniform(8), PerToken(), AbsMax(reach=127.5), refit=True), True, "Linear", "token"),
    (Quant(Uniform(8), PerTensor(), MinMax()), True, "Linear", "each token")])
def test_inputs_that_have_no_place(entry, held, module, words):
    with pytest.raises(FormatError, match=words):
        fit_input(entry, "int4", object() if held else None, (12, 96), module)


def test_can_export_says_the_nearest():
    assert all(answer.held for answer in can_export("w4a8-g32", "executorch:int4", (64, 64)))
    (no,) = can_export("w4-g32", "executorch:int4", (64, 64))
    assert not no.held and no.scheme == "w4a8-g32" and "full precision" in no.reason
    (no,) = can_export("w8a8-g32", "executorch:int8", (64, 64))
    assert no.scheme == "w8a8"


def test_a_missing_package_is_found_before_training_and_says_both_ways(monkeypatch, tmp_path):
    monkeypatch.setattr("qatlas.export.executorch.runtime.find_spec", lambda name: None)
    for call in (lambda: form.plan(Checkpoint({}, {}), "int4"), lambda: form.write(Checkpoint({}, {}), tmp_path / "m.pte", "int4"),
                 lambda: form.read(tmp_path / "m.pte"), lambda: form.answers(tmp_path / "m.pte", [W])):
        with pytest.raises(FormatError, match=r"qatlas\[executorch\].*pip install --no-deps executorch"):
            call()
    assert form.lacks() and not list(tmp_path.iterdir())


def test_an_unknown_target():
    with pytest.raises(FormatError, match="executorch:int4"):
        fit(Quant(Uniform(4)), "int5", (8, 32))
