"""TernaryBERT's three quantizers."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.grain import PerChannel, PerTensor, PerToken
from qatlas.core.grid import Ternary
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMean
from qatlas.papers.ternarybert import activations


def ternarybert(c: Case) -> Answer:
    layerwise, bits, clip = c.p["layerwise"], c.p["num_bits"], c.p["clip"]
    if c.p["cls"] == "TwnQuantizer":
        return fake(c, Quant(Ternary(0.7), PerTensor() if layerwise else PerChannel(), AbsMean(), refit=True, clip=clip), "x")
    return fake(c, activations(bits, PerTensor() if layerwise else PerToken(), c.p["cls"] == "AsymQuantizer", clip)[0], "x")
