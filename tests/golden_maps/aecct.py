"""AECCT: ternary weights by a percentile, activations by their largest magnitude."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Percentile

LACKS = {"grad_delta", "scale"}


def aecct(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind == "absmax":
        return fake(c, Quant(Uniform(p["bits"]), PerTensor(), AbsMax(gradient="statistic", margin=0.5), Clip(0.5)), "x")
    if c.kind == "aap" and a["delta"].item() == 1:
        return fake(c, Quant(Uniform(2, narrow=True), PerTensor(), Percentile(p["percentile"], gradient="statistic", margin=0.5), Clip(0.5)))
    return None                                                   # a learned factor on a statistic is the paper's
