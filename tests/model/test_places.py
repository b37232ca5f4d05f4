"""Places: which weights a model's quantizers see, and where these lie on their grids."""

import pytest
import torch
from torch import nn

from qatlas.core.grain import Group, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.transform import Hadamard
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.layers.rows import Rows
from qatlas.model.places import at_edges, lit, places, weights


def layer(w, quant=None, **more):
    inner = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        inner.weight.copy_(w)
    return QLinear.of(inner, Slots(quant or Quant(Uniform(3), PerTensor(), Learned(AbsMax())), **more))


def test_each_quantizer_comes_once_with_the_weight_that_it_sees():
    torch.manual_seed(0)
    w = torch.randn(6, 8)
    plain, turned = layer(w), layer(w, transform=Hadamard())
    tied = layer(w)
    tied.weight, tied.weight_quantizer = plain.weight, plain.weight_quantizer
    parts = layer(w, Rows((Quant(Uniform(3), PerTensor()), None, Quant(Uniform(4), PerTensor()))))
    bare = layer(w)
    bare.weight_quantizer = None
    found = list(weights(nn.Sequential(plain, turned, tied, parts, bare)))
    first, _, third = parts.weight_quantizer.parts
    assert [q for q, _ in found] == [plain.weight_quantizer, turned.weight_quantizer, first, third]
    for seen, wanted in zip([w for _, w in found], [w, turned.source(), w[:2], w[4:]], strict=True):
        assert torch.equal(seen, wanted) and seen.requires_grad


@pytest.mark.parametrize("grain", [PerTensor(), Group(4)])
def test_places_are_those_of_the_view(grain):
    torch.manual_seed(0)
    one = layer(torch.randn(6, 8), Quant(Uniform(2), grain, Learned(AbsMax())))
    quantizer = one.weight_quantizer
    with torch.no_grad():
        quantizer.scale.mul_(0.5)                                 # some are beyond the grid
    quantizer.on = False
    u, v, inside, values = places(quantizer, one.weight)
    quantizer.on = True
    view, s = grain.view(one.weight.detach()), quantizer.scale.detach().unsqueeze(-1)
    assert torch.equal(u, view / s) and torch.equal(values, grain.view(one.hard())) and torch.equal(v, (view / s).round().clamp(-2, 1))
    assert torch.equal(inside, (u >= -2) & (u <= 1)) and inside.any() and not inside.all()


def test_a_quantizer_is_lit_for_a_while():
    quantizer = layer(torch.randn(6, 8)).weight_quantizer
    for before in (False, True):
        quantizer.on = before
        with pytest.raises(KeyError), lit(quantizer):
            assert quantizer.on
            raise KeyError
        assert quantizer.on is before


def test_the_share_at_the_edges_is_counted():
    one = layer(torch.tensor([[0.45, 1.0, -1.55, 2.39, 9.0, -9.0, 0.0, 0.5]]))
    with torch.no_grad():
        one.weight_quantizer.scale.fill_(1.0)
    model = nn.Sequential(one)
    assert at_edges(model) == 3 / 8 and at_edges(model, within=0.2) == 4 / 8 and at_edges(nn.Sequential(nn.ReLU())) == 0
