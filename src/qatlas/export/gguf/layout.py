"""Layout: how the codes of one GGUF block lie in bytes. Both directions, from codes and scales, never from weights.

A row of K weights is K / size blocks; a block holds one fp16 step d and `size` small integers q, and stands for d * q.

    layout   size  bytes  fields                 order of the integers
    Q8_0       32     34  fp16 d; 32 int8        as they come
    Q4_0       32     18  fp16 d; 16 bytes       u = q + 8; byte i = u[i] | u[i + 16] << 4
    TQ2_0     256     66  64 bytes; fp16 d       u = q + 1; half h, byte i = sum over j = 0..3 of u[128 h + 32 j + i] << 2 j

A nibble byte pairs element i with element i + 16, not with its neighbour, so that a vector unit masks the low half of 16 bytes and has 16 neighbours.
TQ2_0 spreads the four pairs of bits of a byte 32 apart for the same reason. d is signed; a negative d is legal.

Source: ggml-common.h and ggml-quants.c of llama.cpp; held against bytes made by the gguf package 0.19.0 (tests/golden/gguf.npz).
Otherwise than gguf.quantize, which chooses d from the weights (Q4_0: the value of largest magnitude over -8): a trained step is not that number, so
packing a trained weight through it would move the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One block type. size: elements of a block. low, high: the integers it is used for. spread: q (..., size) int16 -> bytes (..., n) uint8,
    gather: the inverse. first: whether d stands before the integers. file_type: the informative number in the header."""

    type: str
    size: int
    low: int
    high: int
    spread: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    first: bool
    file_type: int

    def pack(self, q: Tensor, d: Tensor) -> Tensor:
        """q (N, K) integers, d (N, K / size) steps that fp16 holds -> (N, bytes of a row) uint8.

        >>> LAYOUTS["q4_0"].pack(torch.arange(-8, 8).repeat(1, 2), torch.ones(1, 1))[0, :6]
        tensor([ 0, 60,  0, 17, 34, 51], dtype=torch.uint8)
        """
        codes = self.spread(q.to(torch.int16).unflatten(-1, (-1, self.size)))                  # (N, blocks, n)
        step = d.to(torch.float16).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))       # (N, blocks, 2), little endian
        return torch.cat([step, codes] if self.first else [codes, step], -1).flatten(-2)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: (N, bytes) uint8 -> q (N, K) int16, d (N, K / size) fp32."""
        nbytes = 2 + self.spread(torch.zeros(self.size, dtype=torch.int16)).numel()
        blocks = rows.unflatten(-1, (-1, nbytes))
        step, codes = (blocks[..., :2], blocks[..., 2:]) if self.first else (blocks[..., -2:], blocks[..., :-2])
        return self.gather(codes).flatten(-2), step.contiguous().view(torch.float16).squeeze(-1).float()


def _to_nibbles(q: Tensor) -> Tensor:
    u = (q + 8).to(torch.uint8)                                    # (..., 32)
    return u[..., :16] | u[..., 16:] << 4


def _from_nibbles(b: Tensor) -> Tensor:
    return torch.cat([b & 15, b >> 4], -1).to(torch.int16) - 8


def _to_pairs(q: Tensor) -> Tensor:
    u = (q + 1).to(torch.uint8).unflatten(-1, (2, 4, 32))          # (..., half, j, i)
    return (u[..., 0, :] | u[..., 1, :] << 2 | u[..., 2, :] << 4 | u[..., 3, :] << 6).flatten(-2)


def _from_pairs(b: Tensor) -> Tensor:
    halves = b.unflatten(-1, (2, 1, 32))
    return torch.cat([halves >> 2 * j & 3 for j in range(4)], -2).flatten(-3).to(torch.int16) - 1


LAYOUTS = {
    "q8_0": Layout("Q8_0", 32, -128, 127, lambda q: q.to(torch.int8).contiguous().view(torch.uint8),
                   lambda b: b.contiguous().view(torch.int8).to(torch.int16), True, 7),
    "q4_0": Layout("Q4_0", 32, -8, 7, _to_nibbles, _from_nibbles, True, 2),
    "tq2_0": Layout("TQ2_0", 256, -1, 1, _to_pairs, _from_pairs, False, 37),
}
