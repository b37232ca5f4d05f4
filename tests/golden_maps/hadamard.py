"""The Hadamard transform of SpinQuant."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case

from qatlas.core import transform


def hadamard(c: Case) -> Answer:
    x = c.a["x"].clone().requires_grad_()
    y = transform.hadamard(x)
    y.backward(c.a["grad_out"])
    answer = {"y": y.detach(), "yt": transform.hadamard(c.a["x"], transpose=True), "grad_x": x.grad}
    return answer | ({"matrix": transform.hadamard(torch.eye(x.shape[-1], dtype=x.dtype))} if "matrix" in c.a else {})
