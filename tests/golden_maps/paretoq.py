"""ParetoQ, through the paper's own of_weight where it means the same."""

from __future__ import annotations

import math

from golden_cases import Answer, Case
from golden_means import fake, grain_of, layer

from qatlas.core.estimator import Clip
from qatlas.core.grain import Grain
from qatlas.core.grid import Sign, Stretched, Ternary, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned
from qatlas.papers.paretoq import of_weight


def paretoq_quant(bits: int, stretched: bool, grain: Grain, elements: int) -> Quant:
    learned = Learned(over="tensor", floor=1e-5)
    if bits == 1:
        return Quant(Sign(), grain, learned.but(gradient="value"), Clip(at=0.99 if stretched else 1.0))
    if stretched:
        levels = 3 if bits == 0 else 2**bits
        return Quant(Stretched(levels), grain, learned.but(factor=1 / math.sqrt(elements * max(2**bits // 2 - 1, 1))), Clip())
    return Quant(Ternary() if bits == 0 else Uniform(bits), grain, learned, Clip())


def paretoq(c: Case) -> Answer:
    bits, grain, stretched = c.p["w_bits"], grain_of(c, "alpha"), c.p["fn"] == "seq" or (c.kind == "linear" and c.p["w_bits"] in (0, 2))
    if stretched and bits < 2:                                    # the paper's own 1.58 bits keep 2/3 of this alpha, its 1 bit reaches to 1
        quant = paretoq_quant(bits, True, grain, c.a["w"].numel())
    else:
        quant = of_weight(bits or 1.58, None if bits == 1 else "stretched" if stretched else "integer", grain)
    return layer(c, quant, None, scale="alpha") if c.kind == "linear" else fake(c, quant, scale="alpha")
