"""QVGen: LSQ+ by channel."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned


def qvgen(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("LSQ"):
        learned = Learned(factor="lsq" if p["use_grad_scaling"] else 1.0, margin=0.5)
        return fake(c, Quant(Uniform(p["bit"], False), PerChannel(), learned, Clip(0.5)), scale="scale", zero="zero")
    return None
