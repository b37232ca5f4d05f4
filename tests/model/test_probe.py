"""A probe leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatlas.core.error import QuantError
from qatlas.model.probe import forward, peaks, undisturbed


class Noisy(nn.Module):
    """Batch norm, dropout, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.linear, self.idle = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.drop(self.norm(x)))


def test_buffers_modes_and_random_numbers_come_back():
    model = Noisy().train()
    model.drop.eval()
    before, random = {name: b.clone() for name, b in model.named_buffers()}, torch.get_rng_state()
    with undisturbed(model):
        forward(model.train(), torch.randn(8, 4))
        forward(model.eval(), torch.randn(8, 4))
        torch.manual_seed(5)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model.training and model.norm.training and not model.drop.training
    assert torch.equal(torch.get_rng_state(), random)


def test_all_comes_back_also_after_an_error():
    model = Noisy().train()
    mean = model.norm.running_mean.clone()
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        forward(model.eval().train(), torch.randn(8, 4))
        model.eval()
        raise ZeroDivisionError
    assert model.training and torch.equal(model.norm.running_mean, mean)


def test_a_batch_goes_by_name_or_by_position(tiny):
    batch = tiny.batch("llama")
    assert forward(tiny.models["llama"](), batch).logits.shape == (2, 10, 128)
    assert forward(tiny.models["vit"](), tiny.batch("vit")["pixel_values"]).logits.shape == (2, 3)
    assert forward(nn.Linear(4, 3), {"pixel_values": torch.zeros(2, 4)}).shape == (2, 3)
    assert forward(tiny.models["plain"](), tiny.batch("plain")).shape == (2, 4)
    with pytest.raises(TypeError):
        forward(nn.Linear(4, 3), {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)})


def test_peaks_are_of_each_input_channel_over_all_batches():
    model = Noisy().eval()
    batches = [torch.eye(4) * 3, -torch.eye(4) * 5]
    with torch.no_grad():
        expected = torch.stack([model.norm(b).abs().amax(0) for b in batches]).amax(0)
    assert torch.equal(peaks(model, batches, ["linear"])["linear"], expected)


def test_a_layer_that_is_never_called_has_no_peak():
    with pytest.raises(QuantError, match="idle was never called"):
        peaks(Noisy(), [torch.ones(2, 4)], ["linear", "idle"])
