"""QTensor: a quantized tensor as data. Codes, scale, zero or offset, grid, grain; nothing trains here.

It is what every exporter takes and every reader gives back, a plain dataclass and no tensor subclass. `codes` are unsigned and have the shape of the
original tensor; `scale` has the shape of the grain's scales and may itself be a QTensor (two-level formats). A QTensor holds a `zero` in codes or an
`offset` in values, never one converted into the other: s (v - z) and s v + m differ in the last bit for half of all weights. An offset may be a
QTensor too, where a format stores it in two levels (Q4_K).

Packing is dense and LSB-first along the last axis: element i of a row lies at bit i * bits of that row, elements may straddle bytes, and each row is
padded to a whole byte. This is the common denominator of compressed-tensors, GPTQ, MatMulNBits and ONNX; other formats permute it (export/).

Composites answer to the same `dequantize()`: `Masked` takes each element from one of two parts (PB-LLM), `Stacked` adds its parts up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .error import CheckpointError, QuantError
from .grain import Grain
from .grid import Grid
from .noun import from_json
from .place import Place, decode


@dataclass
class QTensor:
    """codes uint8 (any shape); scale (the grain's shape), Tensor or QTensor; zero (grid values) or offset (values, Tensor or QTensor), shaped as the
    scale."""

    codes: Tensor
    scale: Tensor | QTensor
    zero: Tensor | None
    offset: Tensor | QTensor | None
    grid: Grid
    grain: Grain
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.zero is not None and self.offset is not None:
            raise QuantError("a QTensor holds a zero in codes or an offset in values, not both")

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor it stands for."""
        return self.codes.shape

    @property
    def bits(self) -> int:
        """Bits a code takes."""
        return int(self.grid.bits)

    @property
    def steps(self) -> Tensor:
        """The scale as a plain tensor of fp32 (or wider) values."""
        s = self.scale.dequantize() if isinstance(self.scale, QTensor) else self.scale
        return s if s.dtype == torch.float64 else s.float()

    @property
    def offsets(self) -> Tensor | None:
        """The offset as a plain tensor, if there is one."""
        return self.offset.dequantize() if isinstance(self.offset, QTensor) else self.offset

    def values(self) -> Tensor:
        """v: the grid values, in steps; shape of the tensor."""
        return self.grid.decode(self.codes, self.steps.dtype)

    def dequantize(self) -> Tensor:
        """The tensor itself, fp32: s (v - z) or s v + m."""
        view = self.grain.view(self.values())
        place = Place.of(self.steps, self.zero, self.offsets, view.dtype)
        return self.grain.back(decode(view, place), self.shape)

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors for a safetensors file: packed codes, scale in its stored type, zero, offset."""
        out = {"codes": pack_bits(self.codes, self.bits)}
        if isinstance(self.scale, QTensor):
            out |= {f"scale.{name}": tensor for name, tensor in self.scale.to_tensors().items()}
        else:
            out["scale"] = self.scale.to(getattr(torch, self.scale_dtype))
        if isinstance(self.offset, QTensor):
            return out | {f"offset.{name}": tensor for name, tensor in self.offset.to_tensors().items()}
        return out | {name: t for name in ("zero", "offset") if (t := getattr(self, name)) is not None}

    def to_meta(self) -> dict[str, Any]:
        """What the tensors do not say, as JSON."""
        parts = {name: part.to_meta() for name in ("scale", "offset") if isinstance(part := getattr(self, name), QTensor)}
        return {"shape": list(self.shape), "grid": self.grid.to_json(), "grain": self.grain.to_json(), "scale_dtype": self.scale_dtype, **parts}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> QTensor:
        """The inverse of `to_tensors` and `to_meta`."""
        try:
            grid, shape = from_json(meta["grid"]), tuple(meta["shape"])
            codes = unpack_bits(tensors["codes"], int(grid.bits), shape)
            scale: Tensor | QTensor = cls._part("scale", tensors, meta) if "scale" in meta else tensors["scale"].float()
            offset = cls._part("offset", tensors, meta) if "offset" in meta else tensors.get("offset")
            return cls(codes, scale, tensors.get("zero"), offset, grid, from_json(meta["grain"]), meta["scale_dtype"])
        except KeyError as missing:
            raise CheckpointError(f"a quantized tensor lacks {missing}; found {', '.join(tensors)}") from None

    @classmethod
    def _part(cls, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> QTensor:
        return cls.of({key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}, meta[name])

    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())


@dataclass
class Masked:
    """Each element from `one` where mask is true, else from `other`. mask: bool of the tensor's shape."""

    mask: Tensor
    one: QTensor
    other: QTensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor it stands for."""
        return self.mask.shape

    def dequantize(self) -> Tensor:
        """fp32, the shape of mask."""
        return torch.where(self.mask, self.one.dequantize(), self.other.dequantize())

    def nbytes(self) -> int:
        """Bytes of what is needed: the codes of each part where it is taken, steps and zeros of both, the mask at one bit an element."""
        taken = int(self.mask.sum())
        total = -(-self.mask.numel() // 8)
        for part, n in ((self.one, taken), (self.other, self.mask.numel() - taken)):
            total += -(-n * part.bits // 8) + sum(t.numel() * t.element_size() for name, t in part.to_tensors().items() if name != "codes")
        return total


@dataclass
class Stacked:
    """The sum of its parts, added from the first to the last: residual and multi-bit binary codes."""

    parts: list[QTensor]

    def dequantize(self) -> Tensor:
        """fp32, the shape of each part."""
        total = self.parts[0].dequantize()
        for part in self.parts[1:]:
            total = total + part.dequantize()
        return total

    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes() for part in self.parts)


def straight(x: Tensor, to: Callable[[Tensor], Tensor]) -> Tensor:
    """to(x), bit for bit, with the gradient of x itself: how a step is rounded to the type in which it is stored."""
    return to(x.detach()) + (x - x.detach())


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Dense LSB-first packing of the last axis: (..., n) uint8 codes -> (..., ceil(n bits / 8)) bytes.

    >>> pack_bits(torch.tensor([1, 2, 3, 0, 1]), 2)
    tensor([57,  1], dtype=torch.uint8)
    """
    if not 1 <= bits <= 8:
        raise QuantError(f"packing takes 1 to 8 bits, not {bits}")
    codes = codes.to(torch.uint8)
    codes = codes.unsqueeze(0) if codes.dim() == 0 else codes
    if bits == 8:
        return codes.contiguous()
    if 8 % bits == 0:                                              # no element straddles bytes
        codes = torch.nn.functional.pad(codes & (2**bits - 1), (0, -codes.shape[-1] % (8 // bits))).unflatten(-1, (-1, 8 // bits))
        return (codes << torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)
    planes = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1      # (..., n, bits)
    stream = planes.flatten(-2)                                    # (..., n * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits` for codes of `shape`.

    Raises:
        CheckpointError: bytes that do not belong to a tensor of that shape.
    """
    rows, n = tuple(shape[:-1]), shape[-1] if shape else 1
    if tuple(packed.shape) != (*rows, -(-n * bits // 8)):
        raise CheckpointError(f"packed codes of shape {tuple(packed.shape)} cannot be {bits}-bit codes of a tensor of shape {tuple(shape)}")
    if bits == 8:
        return packed.clone().reshape(shape)
    if 8 % bits == 0:
        each = (packed.unsqueeze(-1) >> torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)) & (2**bits - 1)
        return each.flatten(-2)[..., :n].reshape(shape)
    at = torch.arange(n, device=packed.device) * bits              # an element begins in one byte and may end in the next
    wide = torch.nn.functional.pad(packed, (0, 1)).to(torch.int16)
    both = wide[..., at // 8] | (wide[..., at // 8 + 1] << 8)
    return ((both >> (at % 8)) & (2**bits - 1)).to(torch.uint8).reshape(shape)
