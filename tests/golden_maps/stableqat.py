"""StableQAT, through the paper's own of_weight; at one bit, which the paper's function leaves out, its wave over the sign."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, grain_of

from qatlas.papers.stableqat import Fourier, of_weight

from .paretoq import paretoq_quant


def stableqat(c: Case) -> Answer:
    amplitude, grain = c.p["amplitude"] or [0.0], grain_of(c, "alpha")
    if c.p["w_bits"] == 1:
        return fake(c, paretoq_quant(1, False, grain, c.a["w"].numel()).but(estimator=Fourier(tuple(amplitude))), scale="alpha")
    return fake(c, of_weight(c.p["w_bits"], amplitude[0], len(amplitude), grain), scale="alpha")
