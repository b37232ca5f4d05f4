"""BiT: its weights, its elastic quantizers with their first step, and a layer of both."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case
from torch.nn import functional as F

from qatlas.core.grid import Uniform
from qatlas.papers.bit import Elastic, Elasticity, of_weight


def holding(quant: Elastic, **state: torch.Tensor) -> Elasticity:
    """An elastic quantizer with a given scale and move."""
    quantizer = quant.build()
    state = {name: t.reshape(-1) for name, t in state.items()}
    quantizer.load_state_dict(state)
    if any(t.dtype == torch.float64 for t in state.values()):
        quantizer.double().load_state_dict(state)
    return quantizer


def bit(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("bwn"):
        w = c.a["w"].clone().requires_grad_()
        y = of_weight(rows=not p["layerwise"]).build()(w)
        y.backward(c.a["grad_out"])
        return {"y": y.detach(), "grad_w": w.grad}
    if c.kind.startswith("linear"):
        w, x, bias = (c.a[name].clone().requires_grad_() for name in ("w", "x", "bias"))
        quantizer = holding(Elastic(Uniform(p["input_bits"], None)).closed(p["symmetric"]), scale=c.a["alpha"], move=c.a["move"])
        y = F.linear(quantizer(x), of_weight().build()(w), bias)
        y.backward(c.a["grad_out"])
        return {"y": y.detach(), "grad_x": x.grad, "grad_w": w.grad, "grad_bias": bias.grad, "grad_alpha": quantizer.scale.grad,
                "grad_move": quantizer.move.grad}
    quant = Elastic(Uniform(p["num_bits"], None), move="none", minimum=True).closed(p["fn"].endswith("Signed"))
    x = c.a["x"].clone().requires_grad_()
    quantizer = quant.build().initialise(x) if p["first_call"] else holding(quant, scale=c.a["alpha_after"])
    quantizer = quantizer.to(x.dtype)
    y = quantizer(x)
    y.backward(c.a["grad_out"])
    return {"y": y.detach(), "grad_x": x.grad, "grad_alpha": quantizer.scale.grad, "alpha_after": quantizer.scale.detach()}
