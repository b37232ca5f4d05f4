"""FIMA-Q: its uniform quantizer."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned


def fimaq(c: Case) -> Answer:
    p = c.p
    if not c.kind.startswith("uniform"):
        return None
    quant = Quant(Uniform(p["n_bits"], p["symmetric"]), PerChannel(), Learned(factor=1.0, margin=0.5), Clip(0.5))
    return fake(c, quant, scale="scale") if p["symmetric"] else fake(c, quant, scale="scale", zero="zero")
