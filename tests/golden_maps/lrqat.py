"""LR-QAT: its layer, its quantizers, its search of ranges."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case
from golden_means import fake
from torch import nn

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned
from qatlas.layers.adapter import Lora
from qatlas.layers.frozen import Places
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.papers.lr_qat import of_weight

FORMS = {"fixed_point8": "fixed", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def lrqat(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("quant_"):
        signed, factor = p["symmetric"], "lsq" if p["grad_scaling"] else 1.0
        quant = Quant(Uniform(p["n_bits"], signed), PerChannel(), Learned(factor=factor, margin=0.5), Clip(0.5))
        return fake(c, quant, scale="delta") if signed else fake(c, quant, scale="delta", zero="zero")
    if c.kind.startswith("lr_qat"):
        return inside(c)
    if c.kind == "lp":
        quantizer = of_weight(p["n_bits"], None, p["symmetric"], p["norm"]).build().initialise(c.a["w"])
        return {"delta": quantizer.scale.detach(), "y": quantizer(c.a["w"]).detach()}
    return None


def inside(c: Case) -> Answer:
    """The layer: places from the weight at the given step, the product, forward, backward, merged."""
    p, a = c.p, c.a
    quant = of_weight(p["n_bits"], p["block"], True, None)
    form = Places(FORMS[p["method"].removeprefix("lr_qat_")])
    linear = nn.Linear(a["w"].shape[1], a["w"].shape[0]).to(a["w"].dtype)
    linear.load_state_dict({"weight": a["w"], "bias": a["bias"]})
    product = Lora(p["r"], p["r"] * p["lora_scaling"], "shift")
    layer = QLinear.of(linear, Slots(quant, adapter=product, frozen=form, keep="recompute")).to(a["w"].dtype)
    steps = a["scale"].reshape(layer.weight_quantizer.scale.shape)
    layer.load_state_dict({"bias": a["bias"], "adapter.a": a["B"], "adapter.b": a["A"], "weight_quantizer.scale": steps, "weight": layer.weight})
    layer.hold(layer.weight_quantizer.taken(a["w"]))
    x = a["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(a["grad_out"])
    answer = {"y": y.detach(), "grad_x": x.grad, "grad_A": layer.adapter.b.grad, "grad_B": layer.adapter.a.grad,
              "grad_scale": layer.weight_quantizer.scale.grad, "phi0": layer.weight.clone(), "codes": layer.quantize().codes}
    layer.merge()
    with torch.no_grad():
        return answer | {"y_merged": layer(a["x"])}
