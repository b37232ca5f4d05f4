"""Whole graphs: no break in our code, forward and backward, and what is kept is fresh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatlas.core.scheme import scheme
from qatlas.layers.ahead import traced
from qatlas.layers.conv import QConv2d
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Quantized, Slots
from qatlas.model.rules import quantize

SCHEMES = ("w4-g16", "w4a8-g16", "w1.58a8")


def linear(text, keep):
    torch.manual_seed(0)
    said = scheme(text)
    return QLinear.of(nn.Linear(32, 16), Slots(said.weight, said.input, keep=keep)).train(), torch.randn(6, 32)


def conv(text, keep):
    torch.manual_seed(0)
    said = scheme(text)
    return QConv2d.of(nn.Conv2d(16, 8, 3), Slots(said.weight, None, keep=keep)).train(), torch.randn(2, 16, 6, 6)


def learnt(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("keep", ["each", "buffer", "recompute"])
@pytest.mark.parametrize("make, text", [(linear, text) for text in SCHEMES] + [(conv, "w4-g16")])
def test_a_layer_is_one_graph(make, text, keep):
    """"aot_eager": dynamo and autograd as in the real thing, without the C++ compiler's seconds."""
    layer, x = make(text, keep)
    wanted = learnt(layer, x)
    torch._dynamo.reset()
    with traced(layer, fullgraph=True, backend="aot_eager"):
        for ours, eager in zip(learnt(layer, x), wanted, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", ["each", "buffer"])
def test_a_graph_sees_every_write(keep):
    """Law 11, compiled: by an optimizer, under no_grad, through .data with a refresh, by a quantizer switched off; no new graph for a write."""
    layer, x = linear("w4-g16", keep)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def write(how):
        with torch.no_grad():
            how()

    with traced(layer, fullgraph=True, backend=counting):
        layer(x)
        first = len(graphs)
        for how in (lambda: layer.weight.mul_(1.5), lambda: layer.weight_quantizer.scale.mul_(0.7), lambda: layer.weight.data.add_(0.3)):
            write(how)
            layer.refresh()
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.hard(), layer.bias))
        write(lambda: layer.weight.neg_())
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.hard(), layer.bias))
        assert len(graphs) == first
        layer.weight_quantizer.on = False
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer._compiled_call_impl is None and not layer.ahead


def test_without_the_context_a_graph_quantizes_afresh():
    layer, x = linear("w4-g16", "buffer")
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="eager")
    run(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(run(x), nn.functional.linear(x, layer.hard(), layer.bias))


@pytest.mark.parametrize("keep", ["each", "buffer"])
def test_quantized_attention_is_one_graph(keep):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    full = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                        vocab_size=64, use_cache=False))
    model = quantize(full, "w4a8kv8-g16").train()
    for layer in model.modules():
        if isinstance(layer, Quantized):
            layer.keep = keep
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids)                                          # compares the attention with the model's own, once, eager
    def grads():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    wanted = grads()
    torch._dynamo.reset()
    with traced(model, fullgraph=True, backend="aot_eager"):
        for ours, eager in zip(grads(), wanted, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
