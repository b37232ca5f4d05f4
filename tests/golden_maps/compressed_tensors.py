"""The compressed-tensors package: packed words, fp4, scales and zeros."""

from __future__ import annotations

from golden_cases import Answer, Case

from qatlas.core.floats import Float
from qatlas.core.grain import Grain, Group, PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.qtensor import pack_bits, unpack_bits
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, MinMax

LACKS = {"packed_old"}


def compressed_tensors(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind == "pack":
        codes = Uniform(p["num_bits"]).encode(a["codes"].float())
        return {"packed": pack_bits(codes, p["num_bits"]), "packed_dim0": pack_bits(codes.T.contiguous(), p["num_bits"]).T}
    if c.kind == "fp4":
        codes = unpack_bits(a["fp4_bytes"], 4, tuple(a["fp4"].shape))
        return {"fp4_bytes": pack_bits(Float(2, 1).encode(a["fp4"]), 4), "fp4": Float(2, 1).decode(codes)}
    grain: Grain = {"channel": PerChannel(), "tensor": PerTensor()}.get(p["strategy"]) or Group(p["group_size"])
    scale = AbsMax((2 ** p["num_bits"] - 1) / 2, floor=2.0**-23) if p["symmetric"] else MinMax(floor=2.0**-23)
    stored = Quant(Uniform(p["num_bits"]), grain, scale).quantize(a["w"])
    answer = {"scale": stored.steps, "q": stored.values(), "deq": stored.dequantize(), "fake": Quantizer(Quant(stored.grid, grain, scale))(a["w"])}
    return answer if p["symmetric"] else answer | {"zero": stored.zero}
