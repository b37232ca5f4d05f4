"""BitNet b1.58: transformers' layers and Microsoft's, with their packed bytes."""

from __future__ import annotations

import torch
from golden_cases import Answer, Case
from golden_means import fake, layer
from torch.nn import functional as F

from qatlas.core.grain import PerTensor
from qatlas.core.grid import Ternary
from qatlas.core.qtensor import QTensor, pack_bits
from qatlas.core.quantizer import Quantizer
from qatlas.papers.bitnet import of_input as bitnet_input
from qatlas.papers.bitnet import of_weight as bitnet_weight

LACKS = {"w2"}


def bitnet(c: Case) -> Answer:
    weight, inputs = bitnet_weight(1.58), bitnet_input()
    if c.kind.startswith("weight") or c.kind == "act":
        dtype = {"bf16": torch.bfloat16}.get(c.p.get("dtype", ""), c.a["y"].dtype)
        return fake(c, inputs if c.kind == "act" else weight, "x" if c.kind == "act" else "w", dtype)
    if c.kind.startswith("auto_online"):
        return layer(c, weight, inputs)
    if c.kind == "gpu_layout":
        stored = weight.quantize(c.a["w"])
        return {"codes": stored.codes, "w_hat": stored.dequantize()}
    if c.kind == "gpu_bitlinear_bf":
        return layer(c, None, inputs)
    codes = Ternary().encode(c.a["codes"].float())
    rows = F.pad(codes, (0, 0, 0, -len(codes) % 4)).unflatten(0, (4, -1))      # a byte holds four rows that lie a quarter of the matrix apart
    packed = {"packed": pack_bits(rows.permute(1, 2, 0), 2).squeeze(-1)} if "packed" in c.a else {}
    if c.kind == "pack":
        return packed
    given = c.a["weight_scale"]                                   # of AutoBitLinear the step, of BitLinear one over it
    step = given if c.kind.startswith("auto") else torch.tensor([1 / given.item()])
    stored = QTensor(codes, step, None, None, Ternary(), PerTensor())
    return packed | {"y": F.linear(Quantizer(inputs)(c.a["x"]), stored.dequantize(), c.a.get("bias"))}
