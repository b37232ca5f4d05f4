"""StableQAT without its estimator, which is the paper's: the grids and the step of ParetoQ."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, grain_of

from .paretoq import paretoq_quant


def stableqat(c: Case) -> Answer:
    if any(c.p["amplitude"] or []) or c.p["w_bits"] == 1:
        return None                                               # the paper's estimator
    return fake(c, paretoq_quant(c.p["w_bits"], False, grain_of(c, "alpha"), c.a["w"].numel()), scale="alpha")
