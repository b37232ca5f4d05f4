"""Kind: what one compressed-tensors scheme says of a layer, and how config.json says it.

    name          weights                                   one step for                      inputs
    w2a16 ...     integers of 2, 3, 4, 8 bits, packed       a channel, or any group           full precision
    w8a8, w4a8    integers, one byte each                   a channel (w4a8: or any group)    integers of 8 bits, one step a token
    fp8a16        E4M3                                      a channel                         full precision
    fp8_dynamic   E4M3                                      a channel                         E4M3, one step a token
    mxfp4a16      E2M1                                      32 inputs, a power of two         full precision
    nvfp4a16      E2M1                                      16 inputs, E4M3 over one fp32     full precision

The keys are those of QuantizationArgs in compressed-tensors 0.20; it refuses keys that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.floats import Float
from ...core.grain import Group, PerChannel, PerTensor, PerToken
from ...core.grid import Uniform
from ...core.quantizer import Quant
from ...core.scale import AbsMax

INT8 = Quant(Uniform(8), PerToken(), AbsMax(reach=127.5))         # as compressed-tensors finds a token's step: max|x| / ((127 + 128) / 2)
FP8 = Quant(Float(4, 3), PerToken(), AbsMax())
POWER = "float8_e8m0fnu"                                          # a step that is a power of two
NESTED = Quant(Float(4, 3), PerTensor(), AbsMax(dtype=POWER))     # a power of two on top keeps every product exact in the reader's bf16


@dataclass(frozen=True)
class Kind:
    """format: of compressed-tensors. type: int or float. bits: of a weight. sizes: inputs that may share a step: "channel", "any" or a number.
    input: the Quant of inputs, None for full precision. own: the Quant of weights that it would choose itself."""

    format: str
    type: str
    bits: int
    sizes: str | int
    own: Quant
    input: Quant | None = None

    @property
    def packed(self) -> bool:
        """Whether codes share words, under the name weight_packed."""
        return "pack" in self.format

    def args(self, size: int | None, symmetric: bool) -> dict[str, Any]:
        """`weights` of a config group. size: inputs of a step, None for one step a channel."""
        said: dict[str, Any] = {"num_bits": self.bits, "type": self.type, "symmetric": symmetric, "dynamic": False}
        if self.own.scale.nested is not None:
            return said | {"strategy": "tensor_group", "group_size": size, "scale_dtype": "torch.float8_e4m3fn"}
        if self.own.scale.dtype == POWER:
            return said | {"strategy": "group", "group_size": size, "scale_dtype": "torch.uint8"}
        return said | ({"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size})

    def input_args(self) -> dict[str, Any] | None:
        """`input_activations` of a config group."""
        if self.input is None:
            return None
        return {"num_bits": self.input.bits, "type": self.type, "symmetric": True, "strategy": "token", "dynamic": True}


def _packed(bits: int) -> Kind:
    return Kind("pack-quantized", "int", bits, "any", Quant(Uniform(bits), Group(128), AbsMax(dtype="bfloat16")))


KINDS = {
    **{f"w{bits}a16": _packed(bits) for bits in (2, 3, 4, 8)},
    "w4a8": Kind("int-quantized", "int", 4, "any", Quant(Uniform(4), PerChannel(), AbsMax()), INT8),
    "w8a8": Kind("int-quantized", "int", 8, "channel", Quant(Uniform(8), PerChannel(), AbsMax()), INT8),
    "fp8a16": Kind("float-quantized", "float", 8, "channel", Quant(Float(4, 3), PerChannel(), AbsMax())),
    "fp8_dynamic": Kind("float-quantized", "float", 8, "channel", Quant(Float(4, 3), PerChannel(), AbsMax()), FP8),
    "mxfp4a16": Kind("mxfp4-pack-quantized", "float", 4, 32, Quant(Float(2, 1), Group(32), AbsMax(dtype=POWER))),
    "nvfp4a16": Kind("nvfp4-pack-quantized", "float", 4, 16, Quant(Float(2, 1), Group(16), AbsMax(nested=NESTED))),
}
MIXED = "mixed"
