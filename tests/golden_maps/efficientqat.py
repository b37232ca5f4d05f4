"""EfficientQAT: groups with learned steps and zeros, and packed words."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import Group
from qatlas.core.grid import Uniform
from qatlas.core.qtensor import pack_bits
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned, MinMax

LACKS = {"scales", "qzeros", "g_idx"}


def efficientqat(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind == "pack":
        return {"qweight": pack_bits(a["codes"], p["bits"]).T}
    if a["w"].shape[1] % p["group_size"]:
        return None
    learned = Learned(MinMax(), factor=1.0, margin=0.5, floor=1e-4)
    return fake(c, Quant(Uniform(p["n_bits"], False), Group(p["group_size"]), learned, Clip(0.5)), scale="scale", zero="zero")
