"""PD-QAT: DoReFa weights, activations on a fixed step of [0, 1], and the soft cross entropy of its output constraint."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case
from golden_means import fake
from torch import nn

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.papers.quantization_constraints import Bounded, of_weight
from qatlas.train.loss import soft_cross_entropy

LACKS = {"grad_target"}                                           # of probabilities; ours takes logits, and hands them this behind a softmax


def pdqat(c: Case) -> Answer:
    if c.kind == "weight":
        return weight(c)
    if c.kind == "soft_ce":
        logits = c.a["logits"].clone().requires_grad_()
        value = soft_cross_entropy(logits, c.a["target"].log())
        value.backward()
        return {"loss": value.detach(), "grad_logits": logits.grad}
    if c.kind != "act" or c.p["bits"] > 16:
        return None
    quant = Quant(Uniform(c.p["bits"], False), PerTensor(), Learned(), Clip())
    return fake(Case(c.file, c.name, c.p, c.a | {"step": torch.tensor(1 / (2 ** c.p["bits"] - 1))}, c.rest), quant, "x", scale="step")


def weight(c: Case) -> Answer:
    """The weight that a layer computes with; 32 bits are the same view without a quantizer."""
    plain = nn.Linear(c.a["w"].shape[1], c.a["w"].shape[0], bias=False, dtype=c.a["w"].dtype)
    plain.weight = nn.Parameter(c.a["w"].clone())
    layer = QLinear.of(plain, Slots(of_weight("dorefa", c.p["bits"]) if c.p["bits"] < 32 else None, adapter=Bounded()))
    y = layer.computed()
    y.backward(c.a["grad_out"])
    return {"y": y.detach(), "grad_w": layer.weight.grad}
