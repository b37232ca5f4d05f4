"""can_export: every tensor yes or no, the reason, and what can, found by asking the formats themselves."""

import pytest
import torch
from torch import nn

from qatlas.core.error import FormatError, QuantError
from qatlas.core.grid import HalfStep
from qatlas.core.scheme import scheme, weight
from qatlas.export import able, targets
from qatlas.export.able import Numbers
from qatlas.model.exportable import can_export, holders
from qatlas.model.load import load
from qatlas.model.pack import pack
from qatlas.model.rules import Rule, quantize

TARGET = "gguf:q4_0"


@pytest.fixture
def llama(llama_dir):
    return load(llama_dir)[0]


def test_a_model_trained_for_the_target_is_held_tensor_by_tensor(llama):
    model = quantize(llama, "w4-g32", target=TARGET)
    answers = can_export(model, TARGET)
    assert len(answers) == 14 and all(answer.held for answer in answers) and str(answers[0]).endswith("yes")
    assert TARGET in holders(model) and "gguf:tq2_0" not in holders(model)
    assert all(answer.held for answer in can_export(pack(model), TARGET))


def test_without_the_target_its_steps_do_not_fit(llama):
    model = quantize(llama, "w4-g32")
    answer = can_export(model, TARGET)[0]
    assert not answer.held and "float16" in answer.reason
    assert TARGET in answer.targets, "trained for it, it would"
    assert not can_export(pack(model), TARGET)[0].held


def test_a_no_names_the_reason_and_what_can(llama):
    answer = can_export(quantize(llama, "w2-g64"), "onnx:int8")[0]
    assert answer.held
    (no,) = can_export("w4-g64", "gguf:tq2_0")
    assert no.scheme == "w1.58-g256" and "gguf:q4_0" in no.targets and "gguf:tq2_0" not in no.targets
    assert "no, " in str(no) and no.scheme in str(no)


def test_embeddings_may_take_another_type_of_the_format(llama):
    model = quantize(llama, [Rule("@head", weight=weight(8)), Rule("*_proj", weight=scheme("w4-g32").weight)], target=TARGET)
    answers = {answer.name: answer for answer in can_export(model, TARGET)}
    assert answers["lm_head.weight"].held
    assert can_export(pack(model), TARGET)[-1].held


def test_the_writer_has_the_last_word(llama):
    model = pack(quantize(llama, "w4-g32", target=TARGET))
    model.config.hidden_act = "gelu"
    last = can_export(model, TARGET)[-1]
    assert last.name == "" and "silu" in last.reason and "the model: no" in str(last)


def test_inputs_count_where_the_format_has_a_place_for_them():
    (no,) = can_export("w8a8", "onnx:int8", (64, 64))
    assert "constant of the file" in no.reason and no.scheme == "w8a8-static"
    assert can_export("w8a8", "compressed-tensors:w8a8")[0].held
    assert can_export("w8", "compressed-tensors:w8a8")[0].scheme == "w8a8"


@pytest.mark.parametrize("name", targets())
def test_the_nearest_scheme_is_one_that_the_target_holds(name):
    numbers = Numbers(weight(2).but(grid=HalfStep(2)), shape=(16, 512))
    near = able.nearest(numbers, name)
    if near is not None:
        said = scheme(near)
        assert able.refusal(Numbers(said.weight, said.input, shape=(16, 512)), name) is None
    for text in able.schemes()[:: len(able.schemes()) // 7]:
        said = scheme(text)
        asked = Numbers(said.weight, said.input, shape=(16, 512))
        if able.refusal(asked, name) is None:
            assert able.nearest(asked, name) == text, "what is held is nearest to itself"


def test_what_is_no_quantized_model_or_no_target():
    with pytest.raises(QuantError, match="no quantized layer"):
        can_export(nn.Linear(4, 4), TARGET)
    with pytest.raises(FormatError, match="gguf:q4_0"):
        can_export("w4", "gguf:q4_2")


def test_a_refusal_before_training_names_the_nearest_scheme(llama):
    with pytest.raises(FormatError, match=r"nearest scheme that gguf:q4_0 holds at this shape: w4\n"):
        quantize(llama, "w5-g64", target=TARGET)
    assert torch.is_tensor(llama.lm_head.weight)


def test_signals_inside_attention_are_answered_too(llama):
    key = scheme("w4a8").input
    model = quantize(llama, [Rule("*_proj", weight=scheme("w4-g32").weight), Rule("*.self_attn:key", signal=key)])
    first = can_export(model, "compressed-tensors:w4a16")[0]
    assert first.name.endswith("self_attn:key") and "inside attention" in first.reason
    assert "constant of the file" in can_export(model, "onnx:int4")[0].reason and can_export(model, "onnx:int4-weights")[0].held
    assert can_export(model, TARGET)[0].held and "onnx:int4" not in holders(model)
