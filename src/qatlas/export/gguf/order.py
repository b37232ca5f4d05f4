"""Order: which byte of a GGUF block holds which code. Both directions; codes are unsigned, as a grid encodes them; blocks stand in the last axis.

Vector units shape all of these. Elements that share a byte lie 16, 32 or 64 apart and not side by side, so that one mask over 16 or 32 bytes gives
as many neighbours.

    nibbles      16 bytes of 32     byte i = u[i] | u[i + 16] << 4                                          Q4_0, Q4_1, MXFP4, IQ4_NL
    fives        4 + 16 of 32       bit i of a little-endian u32 is bit 4 of u[i]; then nibbles             Q5_0, Q5_1
    pairs        64 bytes of 256    halves of 128; byte i = sum over j = 0..3 of u[32 j + i] << 2 j         TQ2_0, Q2_K
    trits        52 bytes of 256    five of 0, 1, 2 a byte as a fraction of 243, see below                  TQ1_0
    threes       32 + 64 of 256     bit j of byte i is bit 2 of u[32 j + i]; then pairs                     Q3_K
    halves       128 bytes of 256   pairs of 32; byte i of pair p = u[64 p + i] | u[64 p + 32 + i] << 4     Q4_K
    five_halves  32 + 128 of 256    bit j of byte i is bit 4 of u[32 j + i]; then halves                    Q5_K
    sixes        128 + 64 of 256    halves of 128, quarters A B C D: A | C << 4, B | D << 4 of their low    Q6_K
                                    nibbles; then two bits each, A | B << 2 | C << 4 | D << 6

Trits: elements 32 j + i (j = 0..4, i = 0..31), then 160 + 16 j + i (i = 0..15), then 240 + 4 j + i (j = 0..3, i = 0..3). x = sum u_j 3^(4 - j) is
stored as the byte ceil(256 x / 243), a fraction of one: multiplying by 3 pushes the next trit over the top of the byte.

Sub-scales of K blocks: 16 pairs of 4 bits (Q2_K), 16 of 6 bits in 12 bytes (Q3_K), 8 pairs of 6 bits in 12 bytes (Q4_K, Q5_K), 16 bytes (Q6_K).

Source: ggml-quants.c of llama.cpp, and gguf.quants of the gguf package 0.19.0, against which tests/export/gguf/test_layout.py holds random bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed_bytes(u: Tensor) -> Tensor:
    """u = q + 128 -> the byte of the int8 q; its own inverse."""
    return u ^ 128


def to_nibbles(u: Tensor) -> Tensor:
    """(..., 32) -> (..., 16)"""
    return u[..., :16] | u[..., 16:] << 4


def from_nibbles(b: Tensor) -> Tensor:
    """The inverse of `to_nibbles`."""
    return torch.cat([b & 15, b >> 4], -1)


def to_fives(u: Tensor) -> Tensor:
    """(..., 32) -> (..., 20)"""
    return torch.cat([_bits(u >> 4), to_nibbles(u & 15)], -1)


def from_fives(b: Tensor) -> Tensor:
    """The inverse of `to_fives`."""
    return from_nibbles(b[..., 4:]) | _unbits(b[..., :4]) << 4


def to_pairs(u: Tensor) -> Tensor:
    """(..., 256) -> (..., 64)"""
    return _join(u.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def from_pairs(b: Tensor) -> Tensor:
    """The inverse of `to_pairs`."""
    return _split(b.unflatten(-1, (2, 32)), 2).flatten(-3)


def to_trits(u: Tensor) -> Tensor:
    """(..., 256) -> (..., 52)"""
    parts = [u[..., :160].unflatten(-1, (5, 32)), u[..., 160:240].unflatten(-1, (5, 16)), u[..., 240:].unflatten(-1, (4, 4))]
    powers = torch.tensor([81, 27, 9, 3, 1], device=u.device)[:, None]
    x = torch.cat([(part * powers[: part.shape[-2]]).sum(-2) for part in parts], -1)           # (..., 52) below 243
    return ((x * 256 + 242) // 243).to(torch.uint8)


def from_trits(b: Tensor) -> Tensor:
    """The inverse of `to_trits`."""
    powers = torch.tensor([1, 3, 9, 27, 81], device=b.device)[:, None]
    parts = [(b[..., None, a:z].int() * powers[:n] % 256 * 3 >> 8).flatten(-2) for a, z, n in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    return torch.cat(parts, -1).to(torch.uint8)


def to_threes(u: Tensor) -> Tensor:
    """(..., 256) -> (..., 96)"""
    return torch.cat([_join((u >> 2).unflatten(-1, (8, 32)), 1), to_pairs(u & 3)], -1)


def from_threes(b: Tensor) -> Tensor:
    """The inverse of `to_threes`."""
    return from_pairs(b[..., 32:]) | _split(b[..., :32], 1).flatten(-2) << 2


def to_halves(u: Tensor) -> Tensor:
    """(..., 256) -> (..., 128)"""
    return _join(u.unflatten(-1, (4, 2, 32)), 4).flatten(-2)


def from_halves(b: Tensor) -> Tensor:
    """The inverse of `to_halves`."""
    return _split(b.unflatten(-1, (4, 32)), 4).flatten(-3)


def to_five_halves(u: Tensor) -> Tensor:
    """(..., 256) -> (..., 160)"""
    return torch.cat([_join((u >> 4).unflatten(-1, (8, 32)), 1), to_halves(u & 15)], -1)


def from_five_halves(b: Tensor) -> Tensor:
    """The inverse of `to_five_halves`."""
    return from_halves(b[..., 32:]) | _split(b[..., :32], 1).flatten(-2) << 4


def to_sixes(u: Tensor) -> Tensor:
    """(..., 256) -> (..., 192)"""
    parts = u.unflatten(-1, (2, 2, 64))                            # (..., half, A B | C D, 64)
    return torch.cat([_join(parts & 15, 4).flatten(-2), _join((u >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)], -1)


def from_sixes(b: Tensor) -> Tensor:
    """The inverse of `to_sixes`."""
    return _split(b[..., :128].unflatten(-1, (2, 64)), 4).flatten(-3) | _split(b[..., 128:].unflatten(-1, (2, 32)), 2).flatten(-3) << 4


def to_scales_of_2(sc: Tensor, mn: Tensor) -> Tensor:
    """Two of (..., 16) below 16 -> (..., 16)"""
    return sc | mn << 4


def from_scales_of_2(b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_scales_of_2`."""
    return b & 15, b >> 4


def to_scales_of_3(sc: Tensor) -> Tensor:
    """(..., 16) below 64 -> (..., 12): low nibbles of 0..7 and 8..15, then the high two bits, four to a byte."""
    return torch.cat([_join((sc & 15).unflatten(-1, (2, 8)), 4), _join((sc >> 4).unflatten(-1, (4, 4)), 2)], -1)


def from_scales_of_3(b: Tensor) -> Tensor:
    """The inverse of `to_scales_of_3`."""
    return _split(b[..., :8], 4).flatten(-2) | _split(b[..., 8:], 2).flatten(-2) << 4


def to_scales_of_4(sc: Tensor, mn: Tensor) -> Tensor:
    """Two of (..., 8) below 64 -> (..., 12): sc_i | top of sc_(i + 4), the same of mn, then the low nibbles of sc_(i + 4) and mn_(i + 4)."""
    tops = [first[..., :4] | first[..., 4:] >> 4 << 6 for first in (sc, mn)]
    return torch.cat([*tops, sc[..., 4:] & 15 | (mn[..., 4:] & 15) << 4], -1)


def from_scales_of_4(b: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_scales_of_4`."""
    a, m, low = b.unflatten(-1, (3, 4)).unbind(-2)
    return torch.cat([a & 63, a >> 6 << 4 | low & 15], -1), torch.cat([m & 63, m >> 6 << 4 | low >> 4], -1)


def _join(parts: Tensor, bits: int) -> Tensor:
    """(..., n, k) of so many bits -> (..., k), the first in the lowest bits."""
    return torch.stack([part << bits * j for j, part in enumerate(parts.unbind(-2))]).sum(0, dtype=torch.uint8)


def _split(b: Tensor, bits: int) -> Tensor:
    """(..., k) -> (..., 8 / bits, k)."""
    return torch.stack([b >> bits * j & 2**bits - 1 for j in range(8 // bits)], -2)


def _bits(u: Tensor) -> Tensor:
    """(..., 32) of one bit -> (..., 4), neighbours in one byte."""
    return _join(u.unflatten(-1, (4, 8)).transpose(-1, -2), 1)


def _unbits(b: Tensor) -> Tensor:
    return _split(b, 1).transpose(-1, -2).flatten(-2)
