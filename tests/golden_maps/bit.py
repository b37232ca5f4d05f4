"""BiT: elastic binarization and its first step."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, holding

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Sign, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMean, Learned

LACKS = {"alpha_after"}


def bit(c: Case) -> Answer:
    p = c.p
    if c.kind.endswith(("fixed", "init")) and c.kind.startswith(("signed", "unsigned")):
        bits, signed = p["num_bits"], p["fn"].endswith("Signed")
        if bits > 1 and not signed:
            return None                                           # subtracts the minimum first
        learned = Learned(AbsMean(2.0 if signed else 4.0, per_root=True), over="tensor", gradient="value" if signed and bits == 1 else "clipped")
        quant = Quant(Sign() if signed and bits == 1 else Uniform(bits, signed), PerTensor(), learned, Clip())
        answer = fake(c, quant, "x", scale="alpha_after")
        x = c.a["x"].clone().requires_grad_()
        quantizer = Quantizer(quant).initialise(x) if p["first_call"] else holding(quant, x.shape, scale=c.a["alpha_after"])
        quantizer.to(x.dtype)(x).backward(c.a["grad_out"])
        return answer | {"alpha_after": quantizer.scale.detach(), "grad_alpha": quantizer.scale.grad}
    return None
