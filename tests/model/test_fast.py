"""Kernels in the place of dequantizing: the same numbers up to sums' order, the same tokens, and a reason for each layer that goes without."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from qatlas.core.error import QuantError
from qatlas.core.grain import Block, Group, PerTensor, PerToken
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MinMax
from qatlas.core.scheme import weight
from qatlas.core.transform import Hadamard
from qatlas.kernels.library import library
from qatlas.layers import kernel
from qatlas.layers.adapter import Lora
from qatlas.layers.linear import QLinear
from qatlas.layers.packed import PackedLinear
from qatlas.layers.quantized import Slots
from qatlas.model.fast import exact, fast, routes, told
from qatlas.model.pack import pack
from qatlas.model.rules import quantize

native = pytest.mark.skipif(library() is None, reason="the CPU kernels were not built")
TOKEN = Quant(Uniform(8), PerToken())
INPUTS = {"none": None, "int8": TOKEN, "int4": Quant(Uniform(4), PerToken()), "narrow": Quant(Uniform(8, narrow=True), PerToken()),
          "zero": Quant(Uniform(8, False), PerToken(), MinMax()), "unsigned": Quant(Uniform(8, False), PerToken()),
          "signed zero": Quant(Uniform(8), PerToken(), MinMax()), "offset": Quant(Uniform(8, False), PerToken(), MinMax("offset"))}
WEIGHTS = {"w4": weight(4, Group(32)), "w3": weight(3), "w2 zeros": Quant(Uniform(2, False), Group(32), MinMax()), "w1.58": weight(1.58),
           "w1": weight(1), "w8": weight(8, PerTensor()), "w4 fp16": Quant(Uniform(4), Group(32), AbsMax(dtype="float16")),
           "w4 nested": Quant(Uniform(4), Group(32), AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax())))}


def linear(w: Quant, x: Quant | None = None, bias: bool = True, **more: Any) -> Any:
    torch.manual_seed(0)
    return QLinear.of(nn.Linear(96, 40, bias=bias), Slots(weight=w, input=x, **more)).pack().eval()


def near(layer: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """The bound of layers/kernel.py, and what the products with a zero add to it."""
    q = x if layer.input_quantizer is None else layer.input_quantizer(x)
    held = layer.store.qtensor()
    grain, shape = layer.store.grain, held.shape
    moved = grain.back(grain.view(held.values()) * held.steps[..., None], shape)
    w = held.dequantize().abs() + (held.dequantize() - moved).abs()                # |s v - s z| + |s z|, or so with an offset
    most = q.abs() @ w.T + (0 if layer.bias is None else layer.bias.abs())
    if (taken := layer.slots.input) is not None and (isinstance(taken.scale, MinMax) or taken.grid.low >= 0):
        most = most + 2 * q.abs().amax(-1, keepdim=True) * w.sum(-1)          # codes and their zero are added up each by itself
    return bool(((a - b).abs() <= 2.0**-23 * (x.shape[-1] + 16) * most).all())


@native
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_fast_is_exact_up_to_the_order_of_sums(weights: str, inputs: str) -> None:
    layer = linear(WEIGHTS[weights], INPUTS[inputs])
    model = nn.Sequential(layer)
    for shape in ((96,), (1, 96), (2, 5, 96), (0, 96), (70, 96)):
        x = torch.randn(shape)
        slow = exact(model)(x)
        found = fast(model)(x)
        assert found.shape == slow.shape and found.dtype == slow.dtype and near(layer, x, found, slow)
    assert torch.equal(exact(model)(x), slow), "and back, bit for bit"
    whole = inputs not in ("none", "offset")
    route, = routes(fast(model))
    assert (route.way, route.reason == "") == ("int8" if whole else "floats", inputs != "offset")


@native
@torch.no_grad()
def test_what_is_no_number_comes_out_as_none() -> None:
    model = nn.Sequential(linear(WEIGHTS["w4"], TOKEN))
    x = torch.randn(4, 96)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    slow, found = exact(model)(x), fast(model)(x)
    assert torch.equal(slow.isnan(), found.isnan()) and found[1].isnan().all() and found[0].isfinite().all()


@native
@torch.no_grad()
def test_a_transform_a_bias_an_output_and_other_types() -> None:
    layer = linear(WEIGHTS["w4"], TOKEN, transform=Hadamard(), output=TOKEN)
    model, x = nn.Sequential(layer), torch.randn(3, 96)
    assert torch.allclose(exact(model)(x), fast(model)(x), atol=0.05), "a code of the output may be its neighbour"
    half = nn.Sequential(linear(WEIGHTS["w4"], bias=False))
    for inputs in (None, TOKEN):
        half = nn.Sequential(linear(WEIGHTS["w4"], inputs))
        half[0].bias.data = half[0].bias.data.bfloat16()
        slow, found = exact(half)(x.bfloat16()), fast(half)(x.bfloat16())
        assert found.dtype == slow.dtype == torch.bfloat16 and torch.allclose(found.float(), slow.float(), atol=0.03, rtol=0.03)
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(half)(x).dtype == torch.bfloat16


@native
def test_a_graph_goes_the_exact_way_and_says_so_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(kernel, "_SAID", [])
    model, x = fast(nn.Sequential(linear(WEIGHTS["w4"], TOKEN))), torch.randn(2, 96)
    with pytest.warns(RuntimeWarning, match="run it under torch.no_grad"):
        y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
    assert model[0].store.scale.grad.abs().sum() > 0 and torch.equal(y, exact(model)(x))


@native
@torch.no_grad()
def test_a_written_scale_is_noticed_and_a_copy_is_its_own() -> None:
    model, x = fast(nn.Sequential(linear(WEIGHTS["w4 fp16"]))), torch.randn(2, 96)
    before, twin = model(x), copy.deepcopy(model)
    model[0].store.scale.mul_(2)
    assert torch.allclose(model(x) - model[0].bias, 2 * (before - model[0].bias), atol=1e-5)
    assert torch.equal(twin(x), before)


@native
@torch.no_grad()
def test_codes_stay_where_they_lie() -> None:
    layer = fast(nn.Sequential(linear(WEIGHTS["w4"])))[0]
    matrix = layer.kernel.matrices[0]
    assert matrix.codes.data_ptr() == layer.store.codes.data_ptr() and matrix.scale.data_ptr() == layer.store.scale.data_ptr()


@native
@pytest.mark.parametrize("inputs", ["none", "int8", "zero"])
@torch.no_grad()
def test_compiled_without_a_break(inputs: str) -> None:
    model, x = fast(nn.Sequential(linear(WEIGHTS["w4"], INPUTS[inputs]), nn.ReLU())), torch.randn(3, 96)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


@pytest.mark.parametrize(("made", "reason"), [
    (lambda: linear(Quant(Uniform(4), Block(8, 8))), "its scales serve Block"),
    (lambda: linear(Quant(Uniform(5))), "its codes have 5 bits"),
    (lambda: adapted(), "it has an adapter"),
])
@torch.no_grad()
def test_what_no_kernel_covers_goes_the_exact_way_with_its_reason(made: Any, reason: str) -> None:
    model, x = nn.Sequential(made()), torch.randn(2, 96)
    slow = model(x)
    assert torch.equal(fast(model)(x), slow)
    route, = routes(model)
    assert route.way == "exact" and reason in route.reason and told([route])[0].startswith("1 layer dequantized in each forward, since ")


def adapted() -> PackedLinear:
    layer = linear(WEIGHTS["w4"])
    layer.adapter = Lora(place="beside").build(torch.empty(40, 96))
    return layer


def test_other_layers_and_models_without_any(monkeypatch: Any) -> None:
    with pytest.raises(QuantError, match="no packed layer"):
        fast(nn.Sequential(nn.Linear(4, 4)))
    model = pack(quantize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(32, 8), nn.Linear(8, 8)), "w4"))
    monkeypatch.setattr(kernel, "library", lambda: None)
    first, second = routes(fast(model))[:2]
    assert (first.way, second.way) == ("exact", "exact") and "PackedConv2d" in first.reason and "were not built" in second.reason
    monkeypatch.undo()
    assert routes(exact(model))[1].reason == ("fast(model) was not called" if library() is not None else second.reason)


SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@native
@pytest.mark.parametrize("scheme", ["w4-g32", "w2a8kv4", "w1.58a8"])
def test_a_trained_model_says_the_same_tokens(scheme: str) -> None:
    torch.manual_seed(0)
    model = quantize(LlamaForCausalLM(LlamaConfig(**SIZE)), scheme).train()
    ids = (torch.arange(40).view(2, 20) * 5 % 50) + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):                                           # until it is sure of what it says
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    pack(model)
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids[:, :8])}
    slow = model.generate(ids[:, :8], **how)
    assert torch.equal(fast(model).generate(ids[:, :8], **how), slow)
    with torch.no_grad():
        apart = (fast(model)(input_ids=ids).logits - exact(model)(input_ids=ids).logits).abs().max()
    assert apart < (1e-4 if "a8" not in scheme else 0.2), "an input at the edge of two codes falls either way"
    assert {route.way for route in routes(fast(model))} == {"int8" if "a8" in scheme else "floats"}


@native
@pytest.mark.parametrize("scheme", ["w4-g32", "w4a8"])
@torch.no_grad()
def test_experts(scheme: str) -> None:
    torch.manual_seed(0)
    model = pack(quantize(MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4)).eval(), scheme))
    ids = torch.arange(12).view(2, 6) + 3
    slow = model(input_ids=ids).logits
    assert torch.allclose(fast(model)(input_ids=ids).logits, slow, atol=1e-4 if scheme == "w4-g32" else 0.05)
    assert {route.way for route in routes(model) if "experts" in route.name} == {"int8" if "a8" in scheme else "floats"}
