"""LLM-QAT: quantizers and linear layers."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, layer

from qatlas.core.grain import PerTensor, PerToken
from qatlas.core.grid import HalfStep, Sign, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax


def llmqat(c: Case) -> Answer:
    p = c.p
    if c.kind == "linear":
        if p["w_bits"] > 2:
            return layer(c, Quant(Uniform(p["w_bits"]), scale=AbsMax()), Quant(Uniform(p["a_bits"]), PerToken(), AbsMax()))
        weight = Quant(Sign(), scale=AbsMean()) if p["w_bits"] == 1 else Quant(HalfStep(2), scale=AbsMean(1.0))
        return layer(c, weight, Quant(Uniform(p["a_bits"]), PerToken(), AbsMax()))
    grain = PerTensor() if p["layerwise"] else PerToken()
    symmetric = p["cls"] == "SymQuantizer"
    return fake(c, Quant(Uniform(p["num_bits"], symmetric), grain, AbsMax() if symmetric else MinMax("offset")), "x")
