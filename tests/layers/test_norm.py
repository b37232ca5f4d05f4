"""A norm in front of a layer: its formula and gradient, its types, where it may stand, and that it goes where the layer goes."""

import json

import pytest
import torch
from tiny import letters, llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from qatlas.core.error import FormatError, QuantError
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.scheme import scheme, weight
from qatlas.core.transform import Hadamard, Smooth
from qatlas.layers.adapter import Lora
from qatlas.layers.conv import QConv2d
from qatlas.layers.embedding import QEmbedding
from qatlas.layers.linear import QLinear, QTransposed
from qatlas.layers.norm import Norm
from qatlas.layers.packed import PackedLinear
from qatlas.layers.quantized import Slots
from qatlas.model.coverage import describe
from qatlas.model.pack import load_into, pack, save
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.train.data import Text
from qatlas.train.task import LanguageModelling

A8 = scheme("w4a8").input
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))


def normed(**slots):
    torch.manual_seed(0)
    layer = QLinear.of(nn.Linear(64, 16), Slots(**{"weight": weight(4), "norm": Norm(), **slots}))
    nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    return layer


def test_it_is_a_root_mean_square_norm():
    layer = normed(norm=Norm(eps=0.1))
    x = X.double().requires_grad_()
    gain = layer.norm.weight.detach().double()
    y = layer.norm(x)
    wanted = gain * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=0)
    g = torch.randn_like(y)
    found, = torch.autograd.grad(y, x, g)
    r = (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()
    closed = r * (g * gain - x * r**2 * (g * gain * x).mean(-1, keepdim=True))
    torch.testing.assert_close(found, closed, rtol=1e-10, atol=1e-12)


def test_the_layer_is_the_norm_then_the_layer():
    plain, layer = QLinear.of(normed(), Slots(weight(4), A8)), normed(input=A8)
    torch.testing.assert_close(layer(X), plain(layer.norm(X)))
    assert "norm.weight" in dict(layer.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_answer_has_the_type_of_the_input(dtype):
    layer = normed(input=A8)
    assert layer(X.to(dtype)).dtype == dtype and layer.norm.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.norm(X), layer.norm(X).float())
        assert layer(X).dtype == torch.bfloat16


@pytest.mark.parametrize("slots", [{}, {"input": A8}, {"transform": Hadamard()}, {"adapter": Lora(4, place="beside")}, {"keep": "buffer"},
                                   {"weight": weight(1.58), "keep": "recompute"}], ids=str)
def test_it_is_packed_with_the_layer(slots):
    layer = normed(**slots)
    if layer.adapter is not None:
        nn.init.normal_(layer.adapter.b)
    packed = layer.eval().pack()
    assert torch.equal(packed(X), layer(X))
    again = PackedLinear.from_meta(json.loads(json.dumps(packed.to_meta())))
    assert not torch.equal(again(X), packed(X))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(X), packed(X))


def test_where_it_cannot_stand():
    with pytest.raises(QuantError, match=r"linear layers only, not of a weight of shape \(4, 3, 1, 1\)"):
        QConv2d.of(nn.Conv2d(3, 4, 1), Slots(weight(4), norm=Norm()))
    with pytest.raises(QuantError, match="transform or norm"):
        QEmbedding.of(nn.Embedding(10, 32), Slots(weight(8), norm=Norm()))
    with pytest.raises(QuantError, match="Smooth looks at the inputs as they come"):
        QLinear.of(nn.Linear(64, 16), Slots(weight(4), norm=Norm(), transform=Smooth()), X.abs().amax((0, 1)))


def test_it_norms_the_inputs_of_a_transposed_layer():
    layer = QTransposed.of(Conv1D(6, 64), Slots(weight(4), norm=Norm()))
    assert layer.norm.weight.shape == (64,)
    torch.testing.assert_close(layer.pack()(X), layer(X))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 2))


def test_a_rule_puts_it_there_and_another_keeps_it_away(tmp_path):
    rules = [*keep_full("2"), Rule("1", norm=Norm()), Rule("*", weight=weight(4), input=A8)]
    assert [from_json(json.loads(json.dumps(rule.to_json()))) for rule in rules] == rules
    model = quantize(small(), rules).eval()
    assert (model[0].norm, model[1].norm.eps) == (None, 1e-5) and type(model[2]) is nn.Linear
    describe(model, torch.ones(1, 64)).check()
    y = model(X)
    save(model, tmp_path / "saved")
    assert torch.equal(load_into(small(), tmp_path / "saved")(X), y) and torch.equal(pack(model)(X), y)
    assert quantize(small(), [Rule("1", norm=None), *rules])[1].norm is None


def test_a_layer_with_nothing_but_a_norm_is_saved_too(tmp_path):
    model = quantize(small(), [Rule("1", norm=Norm()), Rule("0", weight=weight(4))]).eval()
    nn.init.uniform_(model[1].norm.weight)
    y = model(X)
    save(model, tmp_path / "saved")
    assert torch.equal(load_into(small(), tmp_path / "saved")(X), y)


def test_static_steps_are_of_what_the_norm_gives():
    static = Quant(Uniform(8), PerTensor(), Learned(AbsMax(), over="token"))

    class Calibrating:
        """Shows the model one batch of large numbers."""

        target, extra_rules = None, ()

        def calibrate(self, model):
            model[1].input_quantizer.observe()
            model(1000 * X)
            model[1].input_quantizer.settle()

    model = quantize(small(), [Rule("1", weight=weight(4), input=static, norm=Norm())], Calibrating())
    assert model[1].input_quantizer.scale.item() < 10 / 127


def test_no_target_holds_it():
    task = LanguageModelling(Text("a cat sat on a mat " * 40, "a cat " * 20), letters, length=16, batch=4, target="gguf:f32")
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.o_proj: gguf:f32 holds weights, and has no place for the norm"):
        quantize(llama(), [Rule("*.o_proj", norm=Norm(), weight=weight(4))], task)
