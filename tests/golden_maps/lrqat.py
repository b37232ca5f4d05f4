"""LR-QAT: its quantizers."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned


def lrqat(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("quant_"):
        signed, factor = p["symmetric"], "lsq" if p["grad_scaling"] else 1.0
        quant = Quant(Uniform(p["n_bits"], signed), PerChannel(), Learned(factor=factor, margin=0.5), Clip(0.5))
        return fake(c, quant, scale="delta") if signed else fake(c, quant, scale="delta", zero="zero")
    return None
