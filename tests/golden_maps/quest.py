"""QuEST: Gaussian steps, trust, the Hadamard transform around them, and its LSQ."""

from __future__ import annotations

import math

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip, Ste, Trust
from qatlas.core.grain import PerTensor, PerToken
from qatlas.core.grid import HalfStep, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import Learned, Rms
from qatlas.core.transform import hadamard


def quest(c: Case) -> Answer:
    name = str(c.p.get("cls", ""))
    if "bits" not in c.p or "input" not in c.p or "uncentered" in c.kind or c.p["bits"] != int(c.p["bits"]):
        return None                                               # 1.585 bits: 2^1.585 = 3.00008 levels
    inputs = c.rest[c.p["input"]]
    bits, n = int(c.p["bits"]), 2 ** int(c.p["bits"])
    case = Case(c.file, c.name, c.p, inputs | c.a, c.rest)
    table = dict(zip(c.rest["const"]["bits"].tolist(), c.rest["const"]["scales"].tolist(), strict=True))
    gauss = table[float(bits)]
    rms = Rms(2 * gauss / (n - 1))
    plain = name.removeprefix("Half").removeprefix("Hadamard")
    if plain in ("STEQuantizer", "ClipQuantizer", "TrustQuantizer"):
        estimator = {"S": Ste(), "C": Clip(at=(n - 1) / 2 * c.p.get("clip_scale", 1.0)),
                     "T": Trust(c.p["trust"] * (n - 1) / (2 * gauss) if "trust" in c.p else 0.5)}[plain[0]]
        quant = Quant(HalfStep(bits), PerToken(), rms, estimator)
        if name == plain:
            return fake(case, quant, "x")
        x = inputs["x"].clone().requires_grad_()
        y = Quantizer(quant)(hadamard(x))
        y = y if name.startswith("Half") else hadamard(y)
        y.backward(inputs["grad_out"])
        return {"y": y.detach(), "grad_x": x.grad}
    if name in ("LSQQuantizer", "LSQPlusWeightQuantizer"):
        if c.p.get("raise_zero", True):
            high = n / 2 - 0.5
            learned = Learned(factor=1 / math.sqrt(inputs["x"].numel() * (n / 2 - 1)), margin=-0.5)
            return fake(case, Quant(HalfStep(bits), PerTensor(), learned, Clip(at=high)), "x", scale="step")
        return fake(case, Quant(Uniform(bits, not c.p.get("all_positive")), PerTensor(), Learned(over="tensor"), Clip()), "x", scale="step")
    return None
