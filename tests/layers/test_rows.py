"""Rows: parts of one matrix with numbers of their own, in one weight, and packed as one where they can be."""

import pytest
import torch
from torch import nn

from qatlas.core.error import QuantError
from qatlas.core.grain import Group, PerTensor
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, AbsMean, Learned
from qatlas.core.scheme import weight
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import KEEP, Slots
from qatlas.layers.rows import Rows

TWN = Quant(Ternary(0.7), PerTensor(), AbsMean(), refit=True)


def layer(rows, **more):
    torch.manual_seed(0)
    return QLinear.of(nn.Linear(32, 24), Slots(weight=rows, **more))


@pytest.mark.parametrize("quant", [TWN, weight(4), weight(2, Group(16)), Quant(Uniform(8), PerTensor(), Learned(AbsMax()))])
def test_parts_are_quantized_each_by_itself_and_pack_as_one(quant):
    made, x = layer(Rows((quant, quant, quant))), torch.randn(5, 32)
    each = torch.cat([Quantizer(quant).initialise(part).hard(part) for part in made.weight.chunk(3)])
    assert torch.equal(made.hard(), each) and torch.equal(made.quantize().dequantize(), each)
    if quant.grain == PerTensor():
        assert not torch.equal(each, Quantizer(quant).initialise(made.weight).hard(made.weight)), "one scale a part is not one scale for all"
    assert torch.equal(made.pack()(x), made(x))
    assert torch.equal(type(made.pack()).from_meta(made.pack().to_meta()).slots.weight.parts[0].grid.values(), quant.grid.values())


def test_mixed_parts_train_and_refuse_to_pack():
    made, x = layer(Rows((weight(2), None, weight(8)))), torch.randn(5, 32)
    made(x).square().sum().backward()
    assert made.weight.grad.isfinite().all() and torch.equal(made.hard()[8:16], made.weight[8:16])
    assert len(made.hard()[0].unique()) <= 4 < len(made.hard()[23].unique())
    with pytest.raises(QuantError, match="stays in full precision"):
        made.pack()
    with pytest.raises(QuantError, match=r"differ in more than their scales.*Uniform\(bits=2.*Uniform\(bits=8"):
        layer(Rows((weight(2), weight(2), weight(8)))).pack()
    with pytest.raises(QuantError, match="24 rows are not 5 equal parts"):
        layer(Rows((weight(2),) * 5))


@pytest.mark.parametrize("keep", KEEP)
def test_gradients_are_those_of_three_layers(keep):
    parts = (weight(2), None, TWN)
    made, x = layer(Rows(parts), keep=keep), torch.randn(5, 32)
    made(x).square().sum().backward()
    first = made.weight.grad.clone()
    made.zero_grad()
    made(x).square().sum().backward()
    apart = []
    for quant, rows, bias in zip(parts, made.weight.detach().chunk(3), made.bias.detach().chunk(3), strict=True):
        alone = nn.Linear(32, 8)
        alone.weight.data, alone.bias.data = rows.clone(), bias.clone()
        alone = QLinear.of(alone, Slots(weight=quant))
        alone(x).square().sum().backward()
        apart.append(alone.weight.grad)
    assert torch.equal(made.weight.grad, first) and torch.allclose(first, torch.cat(apart), atol=1e-4)
