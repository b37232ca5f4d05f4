"""A model as torch.export has it: names are those of the checkpoint, the marks stand where quantizers did, tokens are open."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.core.error import FormatError, QuantError
from qatlas.core.scheme import scheme
from qatlas.export.executorch.lower import marked
from qatlas.model.pack import checkpoint, pack
from qatlas.model.program import first, program
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.zoo.resnet import resnet

A8 = scheme("w4a8")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, max_position_embeddings=40, tie_word_embeddings=True))
    return pack(quantize(made, [*keep_full("@embedding", "@head"), Rule("*", weight=A8.weight, input=A8.input)])).eval()


def test_names_marks_and_open_tokens(model):
    found = program(model)
    traced = found.model
    used = {traced.names.get(node.target, node.target) for node in traced.module.graph.nodes if node.op == "get_attr"}
    assert set(checkpoint(model).tensors) <= used, "a tied head has the name of its embedding"
    marks = [node for node in traced.module.graph.nodes if marked(node)]
    assert len(marks) == len(found.signals) == 7 and "model.layers.0.mlp.up_proj:input" in found.signals
    assert traced.given[0].shape[0] == 1 and traced.open["given"][0][1].max == 40
    assert traced.module(torch.zeros(1, 23, dtype=torch.int64)).shape == (1, 23, 64)


def test_tokens_end_where_it_is_said(model):
    assert program(model, tokens=24).model.open["given"][0][1].max == 24


def test_an_image_of_the_size_that_the_model_says():
    (name, x), = first(resnet()).items()
    assert name == "pixel_values" and x.shape == (1, 3, 32, 32)


class Jump(nn.Module):
    """Its way depends on its numbers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_what_cannot_be_traced():
    with pytest.raises(FormatError, match="torch.export cannot trace Jump"):
        program(quantize(Jump(), [Rule("a", weight=A8.weight)]), {"x": torch.ones(1, 4)})
    with pytest.raises(QuantError, match="no quantized layer"):
        program(Jump(), {"x": torch.ones(1, 4)})
