"""EdgeQAT: learned steps of weights and activations."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, layer

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned, MinMax


def edgeqat(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("linear"):
        grain = PerTensor() if p["mode"] == "layer_wise" else PerChannel()
        return layer(c, Quant(Uniform(p["nbits_w"]), grain, Learned(over="tensor"), Clip()), None, scale="alpha")
    if c.kind.startswith("act"):
        quant = Quant(Uniform(p["nbits_a"], bool(c.a["signed"].item())), PerTensor(), Learned(MinMax(), over="tensor"), Clip())
        return fake(c, quant, "x", scale="alpha", zero="zp")
    if c.kind.startswith("lsq"):
        grid = Uniform(p["bit"], not p.get("all_positive", False), narrow=p.get("symmetric", False))
        return fake(c, Quant(grid, PerChannel() if p.get("per_channel") else PerTensor(), Learned(over="tensor"), Clip()), scale="alpha")
    return None
