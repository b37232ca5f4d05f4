"""EfficientDM: its uniform quantizer, with learned and with measured steps."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, grain_of

from qatlas.core.estimator import Clip
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned, MinMax


def efficientdm(c: Case) -> Answer:
    p, a = c.p, c.a
    if not c.kind.startswith("uaq"):
        return None
    grain = grain_of(c, "delta")
    grid = Uniform(p["n_bits"], False)
    if "grad_out" in a:
        return fake(c, Quant(grid, grain, Learned(MinMax(), factor=1.0, margin=0.5), Clip(0.5)), "x", scale="delta", zero="zero")
    if p.get("scale_method") == "max":
        stored = Quant(grid, grain, MinMax(floor=1e-8)).quantize(a["x"])
        return {"delta": stored.steps, "zero": stored.zero, "y": stored.dequantize()}
    return None
