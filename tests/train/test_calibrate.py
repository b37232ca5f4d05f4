"""Calibration starts the quantizers of activations, and names those that nobody called."""

import pytest
import torch
from tiny import llama, quantized, task
from torch import nn

from qatlas.core.error import QuantError
from qatlas.core.quantizer import Quantizer
from qatlas.core.scheme import scheme
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.train.calibrate import calibrate, pending
from qatlas.train.evaluate import evaluate


def test_activations_are_calibrated():
    model, subject = quantized(llama(), "w4a8-static").train(), task()
    waiting = pending(model)
    assert len(waiting) == 14 and all(name.endswith("input_quantizer") for name in waiting)
    with pytest.raises(QuantError, match="calibrate"):
        subject.logits(model, subject.batch(0))
    assert subject.calibrate(model) == 14 and not pending(model) and model.training
    for quantizer in waiting.values():
        assert quantizer.ready and quantizer.quant.grid.signed is not None and quantizer.scale.dtype == torch.float32
    assert evaluate(model, subject)["loss"] < 4
    assert subject.calibrate(model) == 0


def test_signedness_and_scale_are_those_of_the_data():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            slots = Slots(input=scheme("w4a8-static").input)
            self.a, self.b = QLinear.of(nn.Linear(4, 4), slots), QLinear.of(nn.Linear(4, 4), slots)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    class Rows:
        def calibration(self, n):
            return [{"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(i))} for i in range(n)]

        def logits(self, model, batch):
            seen.append(batch["x"])
            return model(batch["x"])

    model, seen = Two(), []
    assert calibrate(model, Rows(), 3) == 2 and len(seen) == 3
    assert model.a.input_quantizer.quant.grid.signed and not model.b.input_quantizer.quant.grid.signed
    largest = float(torch.cat(seen).abs().max())
    assert float(model.a.input_quantizer.scale.detach()) * 127 == pytest.approx(largest, rel=0.02)


def test_quantizers_that_nobody_called_are_named():
    model, subject = quantized(llama(), "w4a8-static"), task()
    model.model.layers[1].spare = QLinear.of(nn.Linear(4, 4), Slots(input=scheme("w4a8-static").input))
    with pytest.raises(QuantError, match=r"1 of 15 .*model\.layers\.1\.spare\.input_quantizer"):
        calibrate(model, subject)
    assert len(pending(model)) == 15 and not any(m.observed for m in model.modules() if isinstance(m, Quantizer))
    del model.model.layers[1].spare
    assert calibrate(model, subject) == 14
