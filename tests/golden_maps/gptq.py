"""GPTQ's column update: the Hessian, and PB-LLM's rounding on it."""

from __future__ import annotations

from golden_cases import Answer, Case

from qatlas.core.compensate import Hessian, factor
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.partial import Partial
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax
from qatlas.papers.pb_llm import rounded

LACKS = {"q"}


def gptq(c: Case) -> Answer:
    p, a = c.p, c.a
    hessian = Hessian(a["w"].shape[1])
    for x in a["xs"]:
        hessian.add(x)
    answer = {"H": hessian.value}
    if not c.kind.startswith("pb_"):
        return answer
    how = Partial(salient=1 - p["low_frac"], high=Quant(Uniform(p["high_bits"]), PerChannel(), AbsMax((2 ** p["high_bits"] - 1) / 2)))
    made = rounded(a["w"], how, factor(a["H"], p["percdamp"]), metric=p["salient_metric"], group=p["groupsize"], zeros=True,
                   compensated=not p["disable_gptq"], block=p["blocksize"])
    return answer | {"q": made[0].dequantize()}
