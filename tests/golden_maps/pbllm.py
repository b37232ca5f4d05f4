"""PB-LLM: the part of a weight that keeps more bits."""

from __future__ import annotations

from golden_cases import Answer, Case

from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MinMax


def pbllm(c: Case) -> Answer:
    p, a = c.p, c.a
    if not c.kind.startswith("high") or p["mse"]:
        return None
    grain = PerChannel() if p["perchannel"] else PerTensor()
    if p["sym"]:
        return {"y": Quant(Uniform(p["bits"]), grain, AbsMax((2 ** p["bits"] - 1) / 2)).hard(a["w"])}
    return {"y": Quant(Uniform(p["bits"], False), grain, MinMax()).hard(a["w"])}
