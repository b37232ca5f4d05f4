"""PB-LLM: the part of a weight that keeps more bits, the signs of the rest, and both under one mask."""

from __future__ import annotations

from golden_cases import Answer, Case

from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.partial import Partial, tails
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MinMax, MseSearch
from qatlas.papers.pb_llm import rounded


def pbllm(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind in ("except", "except_pos"):
        return masked(c)
    if c.kind == "low_xnor":
        return {"y": rounded(a["w"], Partial(salient=0.0), group=p["groupsize"], zeros=True)[0].dequantize()}
    if not c.kind.startswith("high"):
        return None
    grain = PerChannel() if p["perchannel"] else PerTensor()
    if p["sym"]:
        return {"y": Quant(Uniform(p["bits"]), grain, AbsMax((2 ** p["bits"] - 1) / 2)).hard(a["w"])}
    scale = MseSearch(MinMax(), steps=80, depth=p["maxshrink"], power=p["norm"]) if p["mse"] else MinMax()
    return {"y": Quant(Uniform(p["bits"], False), grain, scale).hard(a["w"])}


def masked(c: Case) -> Answer:
    """From their latent weights, in which the salient ones have been rounded already: full precision keeps them as they are."""
    mask, latent = tails(c.a["w"], c.p["outlier_fraction"]), c.a["w_8bit"].clone().requires_grad_()
    quantizer = Partial(grain=PerTensor(), salient=c.p["outlier_fraction"], high=None).build().keep(latent.detach(), mask)
    y = quantizer(latent)
    y.backward(c.a["grad_out"])
    assert latent.grad is not None
    return {"mask": mask, "w_eff_train": y.detach(), "grad_w": latent.grad}
