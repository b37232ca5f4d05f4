"""QuEST: the paper's own steps and trust, the rotation around them as a layer has it; the same on FP4's levels and on Lloyd's; its LSQ and LSQ+."""

from __future__ import annotations

import math

import torch
from golden_cases import Answer, Case
from golden_means import fake

from qatlas.core.codebook import Codebook
from qatlas.core.estimator import Clip, Ste, Trust
from qatlas.core.floats import Float
from qatlas.core.grain import PerChannel, PerTensor, PerToken
from qatlas.core.grid import HalfStep, Uniform
from qatlas.core.hadamard import hadamard
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import Learned, MinMax, Rms
from qatlas.core.transform import Hadamard
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.papers.quest import GAUSS, gaussian

FP4 = 2.92247856                                                  # their clip of FP4 for a normal distribution


def quest(c: Case) -> Answer:
    name = str(c.p.get("cls", ""))
    if c.kind == "linear":
        return linear(c)
    if c.kind == "const":
        return {"scales": torch.tensor(list(GAUSS.values()))}
    if c.kind.startswith("LSQPlusAct"):
        return plus(c)
    if name.startswith(("FP4", "HadamardFP4", "Gaussian")):
        return uneven(c, name)
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
        return fake(case, quant, "x") if name == plain else rotated(case, quant, back=not name.startswith("Half"))
    if name in ("LSQQuantizer", "LSQPlusWeightQuantizer"):
        if c.p.get("raise_zero", True):
            high = n / 2 - 0.5
            learned = Learned(factor=1 / math.sqrt(inputs["x"].numel() * (n / 2 - 1)), margin=-0.5)
            return fake(case, Quant(HalfStep(bits), PerTensor(), learned, Clip(at=high)), "x", scale="step")
        return fake(case, Quant(Uniform(bits, not c.p.get("all_positive")), PerTensor(), Learned(over="tensor"), Clip()), "x", scale="step")
    return None


def uneven(c: Case, name: str) -> Answer:
    """Levels of FP4, or Lloyd's for a normal distribution; trust is half of the latter's last gap, that of 4 bits for FP4."""
    case, bits = Case(c.file, c.name, c.p, c.rest[c.p["input"]] | c.a, c.rest), int(c.p.get("bits", 4))
    levels = c.rest[f"levels_b{bits}"]["levels"].tolist()
    grid, step = (Float(2, 1), FP4 / 6) if "FP4" in name else (Codebook(tuple(levels)), 1.0)
    how = Ste() if "STE" in name else Clip() if "Clip" in name else Trust((levels[-1] - levels[-2]) / 2 / step)
    quant = Quant(grid, PerToken(), Rms(step), how)
    return rotated(case, quant) if name.startswith("Hadamard") else fake(case, quant, "x")


def rotated(c: Case, quant: Quant, back: bool = True) -> Answer:
    """A quantizer between a rotation and its way back."""
    x = c.a["x"].clone().requires_grad_()
    y = Quantizer(quant)(hadamard(x))
    y = hadamard(y) if back else y
    y.backward(c.a["grad_out"])
    return {"y": y.detach(), "grad_x": x.grad}


def plus(c: Case) -> Answer:
    """LSQ+ of inputs: a learned step and a learned offset."""
    case, positive = Case(c.file, c.name, c.p, c.rest[c.p["input"]] | c.a, c.rest), bool(c.p.get("all_positive"))
    grid = Uniform(4, False) if positive else HalfStep(4)
    factor = "lsq" if positive else 1 / math.sqrt(case.a["x"].numel() * 7)
    learned = Learned(MinMax("offset"), factor=factor, over="tensor") if positive else Learned(MinMax("offset"), factor=factor, margin=-0.5)
    return fake(case, Quant(grid, PerTensor(), learned, Clip() if positive else Clip(at=7.5)), "x", scale="step", offset="bias")


def linear(c: Case) -> Answer:
    """A layer of 4 bits, both sides rotated and rotated back; ours multiplies where they are rotated."""
    module = torch.nn.Linear(c.a["w"].shape[1], c.a["w"].shape[0], bias=False)
    module.load_state_dict({"weight": c.a["w"]})
    layer = QLinear.of(module, Slots(gaussian(4, PerChannel()), gaussian(4, PerToken()), transform=Hadamard(most=128)))
    x = c.rest[c.p["input"]]["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(c.a["grad_out"])
    return {"y": y.detach(), "grad_x": x.grad, "grad_w": layer.weight.grad}
