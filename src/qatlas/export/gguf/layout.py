"""Layout: how one GGUF block lies in bytes. Both directions, between bytes and a QTensor in the block's own form; never from weights.

A row of K weights is K / size blocks. A block is a QTensor of a fixed form, and its decode is `QTensor.dequantize`, operation for operation:

    type     size  bytes  stands for                    codes           its fields in order
    Q8_0       32     34  d q                           Uniform(8)      d, q
    Q4_0       32     18  d q                           Uniform(4)      d, q
    Q5_0       32     22  d q                           Uniform(5)      d, q
    MXFP4      32     17  d q, d a power of two         Float(2, 1)     d, q
    IQ4_NL     32     18  d T[q], T a fixed table       core.codebook   d, q
    Q4_1       32     20  d q + m                       Uniform(4, 0)   d, m, q
    Q5_1       32     24  d q + m                       Uniform(5, 0)   d, m, q
    TQ1_0     256     54  d q                           Ternary         q, d
    TQ2_0     256     66  d q                           Ternary         q, d
    Q3_K      256    110  (d sc) q                      Uniform(3)      q, 16 sc, d
    Q6_K      256    210  (d sc) q                      Uniform(6)      q, 16 sc, d
    Q2_K      256     84  (d sc) q - (dmin mn)          Uniform(2, 0)   16 sc mn, q, d, dmin
    Q4_K      256    144  (d sc) q - (dmin mn)          Uniform(4, 0)   d, dmin, 8 sc mn, q
    Q5_K      256    176  (d sc) q - (dmin mn)          Uniform(5, 0)   d, dmin, 8 sc mn, q

d, m and dmin are fp16 and signed (MXFP4: E8M0, the exponent alone); sc and mn are small integers, one for each of the sub-blocks: the scale is a
QTensor itself, and so is the offset, whose steps are -dmin. All products are exact in fp32 (11 bits times 7 times 6 at most), so only the sum is
rounded.

Source: ggml-common.h and ggml-quants.c of llama.cpp; held against bytes made by the gguf package 0.19.0 (tests/golden/gguf.npz), and random ones.
Otherwise than gguf.quantize, which chooses d from the weights (Q4_0: the value of largest magnitude over -8): a trained step is not that number, so
packing a trained weight through it would move the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.codebook import IQ4_NL
from ...core.floats import Float
from ...core.grain import Group
from ...core.grid import Grid, Ternary, Uniform
from ...core.qtensor import QTensor
from . import order


@dataclass(frozen=True)
class Layout:
    """One block type. fields: d, m, s (the sub-scales), q, as they stand. file_type: the informative number in the header. size: elements of a block.
    grid: what its codes mean. spread: codes (..., size) -> bytes, gather: the inverse. dtype: the type of d. subs: sub-blocks of a block, steps: the
    grid of their scales, join, part: sub-scales (..., subs) -> bytes, and back."""

    type: str
    file_type: int
    size: int
    grid: Grid
    fields: str
    spread: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    dtype: str = "float16"
    subs: int = 1
    steps: Grid | None = None
    join: Callable[..., Tensor] | None = None
    part: Callable[[Tensor], Any] | None = None

    @property
    def shifted(self) -> bool:
        """Whether it has a place for an offset."""
        return "m" in self.fields

    @property
    def grain(self) -> Group:
        """Where one scale serves."""
        return Group(self.size // self.subs)

    def widths(self) -> dict[str, int]:
        """Bytes of each field of a block."""
        codes = torch.zeros(self.size, dtype=torch.uint8)
        out = {"q": self.spread(codes).numel(), "d": getattr(torch, self.dtype).itemsize, "m": 2}
        if self.join is not None:
            out["s"] = self.join(*[codes[: self.subs]] * (2 if self.shifted else 1)).numel()
        return {name: out[name] for name in self.fields}

    @property
    def bits(self) -> float:
        """Bits of a weight, all told."""
        return 8 * sum(self.widths().values()) / self.size

    def pack(self, own: QTensor) -> Tensor:
        """A QTensor (N, K) in the block's own form (see hold.py) -> (N, bytes of a row) uint8.

        >>> q = QTensor(torch.arange(16).repeat(1, 2).to(torch.uint8), torch.ones(1, 1), None, None, Uniform(4), Group(32))
        >>> LAYOUTS["q4_0"].pack(q)[0, :6]
        tensor([ 0, 60,  0, 17, 34, 51], dtype=torch.uint8)
        """
        scale: Any = own.scale
        offset: Any = own.offset
        parts = {"q": self.spread(own.codes.unflatten(-1, (-1, self.size)))}                   # (N, blocks, n)
        if self.join is None:
            parts |= {"d": to_bytes(scale, self.dtype), **({"m": to_bytes(offset, "float16")} if self.shifted else {})}
        else:
            codes = [level.codes.unflatten(-1, (-1, self.subs)) for level in ((scale, offset) if self.shifted else (scale,))]
            parts |= {"s": self.join(*codes), "d": to_bytes(scale.scale, self.dtype)}
            parts |= {"m": to_bytes(-offset.scale, "float16")} if self.shifted else {}
        return torch.cat([parts[name] for name in self.fields], -1).flatten(-2)

    def unpack(self, rows: Tensor) -> QTensor:
        """The inverse of `pack`: (N, bytes) uint8 -> QTensor (N, K)."""
        widths = self.widths()
        parts = dict(zip(widths, rows.unflatten(-1, (-1, sum(widths.values()))).split(list(widths.values()), -1), strict=True))
        d = from_bytes(parts["d"], self.dtype)
        scale: Any = d
        offset: Any = from_bytes(parts["m"], "float16") if self.shifted else None
        if self.part is not None:
            assert self.steps is not None
            codes = self.part(parts["s"])
            sc, *mn = codes if self.shifted else (codes,)
            scale = QTensor(sc.flatten(-2), d, None, None, self.steps, Group(self.subs), self.dtype)
            offset = QTensor(mn[0].flatten(-2), -offset, None, None, self.steps, Group(self.subs), "float16") if self.shifted else None
        return QTensor(self.gather(parts["q"]).flatten(-2), scale, None, offset, self.grid, self.grain, "float32" if self.part else self.dtype)


def to_bytes(values: Tensor, dtype: str) -> Tensor:
    """(...) -> (..., bytes of one number), little endian."""
    return values.to(getattr(torch, dtype)).unsqueeze(-1).contiguous().view(torch.uint8)


def from_bytes(b: Tensor, dtype: str) -> Tensor:
    """The inverse of `to_bytes`, as fp32."""
    return b.contiguous().view(getattr(torch, dtype)).squeeze(-1).float()


NIBBLES, FIVES, SIXES = (order.to_nibbles, order.from_nibbles), (order.to_fives, order.from_fives), (order.to_sixes, order.from_sixes)
PAIRS, TRITS, THREES = (order.to_pairs, order.from_pairs), (order.to_trits, order.from_trits), (order.to_threes, order.from_threes)
HALVES, FIVE_HALVES, BYTES = (order.to_halves, order.from_halves), (order.to_five_halves, order.from_five_halves), (order.signed_bytes,) * 2
OF_2, OF_3, OF_4 = ((order.to_scales_of_2, order.from_scales_of_2), (order.to_scales_of_3, order.from_scales_of_3),
                    (order.to_scales_of_4, order.from_scales_of_4))

LAYOUTS = {
    "tq1_0": Layout("TQ1_0", 36, 256, Ternary(), "qd", *TRITS),
    "tq2_0": Layout("TQ2_0", 37, 256, Ternary(), "qd", *PAIRS),
    "q2_k": Layout("Q2_K", 10, 256, Uniform(2, False), "sqdm", *PAIRS, "float16", 16, Uniform(4, False), *OF_2),
    "q3_k": Layout("Q3_K", 11, 256, Uniform(3), "qsd", *THREES, "float16", 16, Uniform(6), *OF_3),
    "mxfp4": Layout("MXFP4", 38, 32, Float(2, 1), "dq", *NIBBLES, "float8_e8m0fnu"),
    "q4_0": Layout("Q4_0", 2, 32, Uniform(4), "dq", *NIBBLES),
    "q4_k": Layout("Q4_K", 14, 256, Uniform(4, False), "dmsq", *HALVES, "float16", 8, Uniform(6, False), *OF_4),
    "iq4_nl": Layout("IQ4_NL", 25, 32, IQ4_NL, "dq", *NIBBLES),
    "q4_1": Layout("Q4_1", 3, 32, Uniform(4, False), "dmq", *NIBBLES),
    "q5_0": Layout("Q5_0", 8, 32, Uniform(5), "dq", *FIVES),
    "q5_k": Layout("Q5_K", 16, 256, Uniform(5, False), "dmsq", *FIVE_HALVES, "float16", 8, Uniform(6, False), *OF_4),
    "q5_1": Layout("Q5_1", 9, 32, Uniform(5, False), "dmq", *FIVES),
    "q6_k": Layout("Q6_K", 18, 256, Uniform(6), "qsd", *SIXES, "float16", 16, Uniform(8), *BYTES),
    "q8_0": Layout("Q8_0", 7, 32, Uniform(8), "dq", *BYTES),
}
"""By the size of a weight, the smallest first."""
