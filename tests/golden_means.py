"""The means of a map: build a part of ours with a case's state, call it, run backward, and name what came out as the case does."""

from __future__ import annotations

import math

import torch
from golden_cases import A, Case
from torch import Tensor
from torch.nn import functional as F

from qatlas.core.grain import Grain, PerChannel, PerTensor
from qatlas.core.quantizer import Quant, Quantizer


def holding(quant: Quant, shape: torch.Size, **state: Tensor) -> Quantizer:
    """A Quantizer with a given scale, and zero or offset, loaded as from a checkpoint."""
    quantizer = Quantizer(quant)
    own = quant.grain.scale_shape(shape)
    state = {name: t.reshape(own) if t.numel() == math.prod(own) else t.reshape(-1)[:1].expand(own) for name, t in state.items()}
    quantizer.load_state_dict(state)                              # masters are fp32
    if any(t.dtype == torch.float64 for t in state.values()):
        quantizer.double().load_state_dict(state)
    return quantizer


def put(a: A, source: str, *grads: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients under the names that the case uses; a gradient that it does not record is left out."""
    out = {}
    for grad, name in zip(grads, names, strict=True):
        key = f"grad_{name}" if f"grad_{name}" in a else {"w": "grad_x", "x": "grad_w"}.get(name, "")
        if key in a and grad is not None:
            out[key] = grad
    return out


def fake(c: Case, quant: Quant, x: str = "w", dtype: torch.dtype | None = None, y: str = "y", **state: str) -> dict[str, Tensor]:
    """Forward and backward of one quantizer on the array x; state names the arrays of scale, zero, offset."""
    source = c.a[x].clone().to(dtype or c.a[x].dtype).requires_grad_()
    quantizer = holding(quant, source.shape, **{name: c.a[array].to(source.dtype) for name, array in state.items()})
    out = quantizer(source)
    answer = {y: out.detach()}
    if "grad_out" in c.a:
        out.backward(c.a["grad_out"].to(out.dtype))
        held = [getattr(quantizer, name).grad for name in state]
        answer |= put(c.a, x, source.grad, *held, names=(x, *state.values()))
    if "codes" in c.a and quant.bits > 1:                         # their one-bit codes are signs
        answer["codes"] = quantizer.quantize(source.detach()).codes
    return answer


def layer(c: Case, weight: Quant | None, inputs: Quant | None, **state: str) -> dict[str, Tensor]:
    """A linear layer with quantized weight and input."""
    w, x = c.a["w"].clone().requires_grad_(), c.a["x"].clone().requires_grad_()
    bias = c.a["bias"].clone().requires_grad_() if "bias" in c.a else None
    quantizer = None if weight is None else holding(weight, w.shape, **{name: c.a[array] for name, array in state.items()})
    y = F.linear(x if inputs is None else Quantizer(inputs)(x), w if quantizer is None else quantizer(w), bias)
    y.backward(c.a["grad_out"])
    held = [getattr(quantizer, name).grad for name in state]
    return {"y": y.detach()} | put(c.a, "w", w.grad, x.grad, None if bias is None else bias.grad, *held, names=("w", "x", "bias", *state.values()))


def grain_of(c: Case, scale: str) -> Grain:
    return PerTensor() if c.a[scale].numel() == 1 else PerChannel()
