"""LSQ and its relatives: MQBench, OFQ, EWGS, ReSTE."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip, Ste
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMean, Learned


def lsq_family(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind.startswith("mqlsq"):
        grid = Uniform(p["bits"], signed=p["quant_min"] < 0)
        quant = Quant(grid, PerChannel() if p["per_channel"] else PerTensor(), Learned(margin=0.5), Clip(0.5))
        return fake(c, quant, scale="scale", zero="zero")
    if c.kind.startswith("ofqlsq"):
        return fake(c, Quant(Uniform(p["bit"]), scale=Learned(), estimator=Clip()), scale="scale")
    if c.kind == "statsq":
        return fake(c, Quant(HalfStep(p["num_bits"]), scale=AbsMean(2.0 / 2 ** (p["num_bits"] - 1))))
    if c.kind == "ewgs" and p["delta"] == 0:
        top = p["num_levels"] - 1
        quant = Quant(Uniform(top.bit_length(), False), PerTensor(), Learned(), Ste())
        return fake(Case(c.file, c.name, p, a | {"step": torch.tensor(1 / top)}, c.rest), quant, "x", scale="step")
    if c.kind == "reste" and p["o"] == 1:
        quant = Quant(Sign(), PerTensor(), Learned(), Clip(at=p["t"]))
        return fake(Case(c.file, c.name, p, a | {"step": torch.tensor(1.0)}, c.rest), quant, "x", scale="step")
    return None
