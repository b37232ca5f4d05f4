"""QuEST: the paper's own steps and trust, the rotation around them as a layer has it, and its LSQ."""

from __future__ import annotations

import math

import torch
from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel, PerTensor, PerToken
from qatlas.core.grid import HalfStep, Uniform
from qatlas.core.hadamard import hadamard
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import Learned
from qatlas.core.transform import Hadamard
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.papers.quest import GAUSS, gaussian


def quest(c: Case) -> Answer:
    name = str(c.p.get("cls", ""))
    if c.kind == "linear":
        return linear(c)
    if "bits" not in c.p or "input" not in c.p or "uncentered" in c.kind or c.p["bits"] != int(c.p["bits"]):
        return None                                               # 1.585 bits: 2^1.585 = 3.00008 levels
    inputs = c.rest[c.p["input"]]
    bits, n = int(c.p["bits"]), 2 ** int(c.p["bits"])
    case = Case(c.file, c.name, c.p, inputs | c.a, c.rest)
    plain = name.removeprefix("Half").removeprefix("Hadamard")
    if plain in ("STEQuantizer", "ClipQuantizer", "TrustQuantizer"):
        believed = {"S": {"trust": math.inf}, "C": {"clip": c.p.get("clip_scale", 1.0)},
                    "T": {"trust": c.p.get("trust", GAUSS[1] if bits == 1 else None)}}[plain[0]]
        quant = gaussian(bits, PerToken(), **believed)
        if name == plain:
            return fake(case, quant, "x")
        x = inputs["x"].clone().requires_grad_()
        y = Quantizer(quant)(hadamard(x))
        y = y if name.startswith("Half") else hadamard(y)
        y.backward(inputs["grad_out"])
        return {"y": y.detach(), "grad_x": x.grad}
    if name in ("LSQQuantizer", "LSQPlusWeightQuantizer"):
        if c.p.get("raise_zero", True):
            high = n / 2 - 0.5
            learned = Learned(factor=1 / math.sqrt(inputs["x"].numel() * (n / 2 - 1)), margin=-0.5)
            return fake(case, Quant(HalfStep(bits), PerTensor(), learned, Clip(at=high)), "x", scale="step")
        return fake(case, Quant(Uniform(bits, not c.p.get("all_positive")), PerTensor(), Learned(over="tensor"), Clip()), "x", scale="step")
    return None


def linear(c: Case) -> Answer:
    """A layer of 4 bits, both sides rotated and rotated back; ours multiplies where they are rotated."""
    module = torch.nn.Linear(c.a["w"].shape[1], c.a["w"].shape[0], bias=False)
    module.load_state_dict({"weight": c.a["w"]})
    layer = QLinear.of(module, Slots(gaussian(4, PerChannel()), gaussian(4, PerToken()), transform=Hadamard(most=128)))
    x = c.rest[c.p["input"]]["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(c.a["grad_out"])
    return {"y": y.detach(), "grad_x": x.grad, "grad_w": layer.weight.grad}
