"""PD-QAT's DoReFa activations: a fixed step on [0, 1]."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned


def pdqat(c: Case) -> Answer:
    if c.kind != "act" or c.p["bits"] > 16:
        return None
    quant = Quant(Uniform(c.p["bits"], False), PerTensor(), Learned(), Clip())
    return fake(Case(c.file, c.name, c.p, c.a | {"step": torch.tensor(1 / (2 ** c.p["bits"] - 1))}, c.rest), quant, "x", scale="step")
