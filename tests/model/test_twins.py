"""Twins: a pair of batch norms in the place of each, and one of them left in it."""

import torch
from torch import nn

from qatlas.model.twins import Twin, pair, part


def test_each_norm_gets_a_twin_once_and_the_low_one_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    old = model[1]
    found = pair(model)
    assert len(found) == 2 and not pair(model) and model[1] is found[0] and model[2][0] is found[1]
    assert found[0].high is old and found[0].low is not old and torch.equal(found[0].low.weight, old.weight)
    x = torch.randn(2, 3, 5, 5)
    model(x)
    assert not old.running_mean.any() and found[0].low.running_mean.any()
    found[0].at = "high"
    model(x)
    assert torch.equal(old.running_mean, found[0].low.running_mean)
    low = found[0].low
    part(model)
    assert model[1] is low and not any(isinstance(m, Twin) for m in model.modules())
