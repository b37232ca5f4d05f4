"""QuEST's activations in one kernel: rotate, find the scale, snap, say where gradients are trusted (papers/quest.py, arXiv 2502.05003).

    z = x H / sqrt(B)        in blocks of B channels, H Sylvester's matrix of +-1
    s = max(times sqrt(mean z^2), floor)      of a whole row, a token or an output channel
    v = snap(z / s),  y = s v                 M = |z / s - v| <= T, or |z / s| <= t

Eager, this reads and writes the row five times; here it is read once and written once. H is made in registers from the parity of i & j, for the
tensor cores: its entries are exact in 16 bits, half-precision activations are multiplied as they are, and fp32 ones as a sum of three bf16 numbers,
which holds all their 24 bits. Sums are fp32 in another order than core/hadamard.py's, so z differs from it in the last bits, and a place that lies
on a tie to that precision may fall to the other side: values are not promised bit for bit, as no two orders of a sum are.

`quantize` gives y and M, `integers` gives whole numbers and steps for linear_int8, `turn` is the rotation alone (backward: (g M) H / sqrt(B), for
H is symmetric), and `Rotated` is the whole with its gradient: saved is M, a byte an element, and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.error import QuantError
from ...core.grain import PerChannel, PerToken
from ...core.grid import HalfStep
from ...core.quantizer import Quant
from ...core.scale import Rms
from .lang import INTERPRETED, jit, launch, need, power, tl
from .snap import KINDS, gate, passes, snap, why_not_snap

MOST = 32768                                                      # channels of a row: they stay in registers


@jit
def hadamard(B: tl.constexpr):
    """(B, B) of +-1, fp32."""
    i = tl.arange(0, B)
    p = i[:, None] & i[None, :]                                   # below 256
    p ^= p >> 4
    p ^= p >> 2
    p ^= p >> 1
    return (1 - 2 * (p & 1)).to(tl.float32)


@jit
def turned(x, B: tl.constexpr, HALF: tl.constexpr, PLAIN: tl.constexpr):
    """x (rows, B) times H, fp32. HALF: x is fp16 or bf16. PLAIN: fp32 products, for the interpreter."""
    h = hadamard(B)
    if PLAIN:
        return tl.dot(x.to(tl.float32), h, input_precision="ieee")
    elif HALF:
        return tl.dot(x, h.to(x.dtype))
    else:
        h = h.to(tl.bfloat16)
        one = x.to(tl.bfloat16)
        rest = x - one.to(tl.float32)
        rest = tl.where(rest == rest, rest, 0.0)                  # infinity less infinity
        two = rest.to(tl.bfloat16)
        three = (rest - two.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(one, h, tl.dot(two, h, tl.dot(three, h)))


@jit
def rotate_quantize(x, y, trusted, steps, tokens, width, low, high, threshold, first, last, times, floor, root, KIND: tl.constexpr,
                    GATE: tl.constexpr, WHOLE: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr, PLAIN: tl.constexpr, BT: tl.constexpr,
                    NB: tl.constexpr, B: tl.constexpr):
    """WHOLE 0: y = s v. 1, 2: y = v or 2 v in int8, and steps. NB: blocks of a row, up to a power of two."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    at = tl.minimum(token, tokens - 1).to(tl.int64)[:, None, None] * width
    k = tl.arange(0, NB)[None, :, None] * B + tl.arange(0, B)[None, None, :]
    mask = (token < tokens)[:, None, None] & (k < width)
    z = tl.load(x + at + k, mask=mask, other=0.0)
    z = tl.reshape(turned(tl.reshape(z, (BT * NB, B)), B, HALF, PLAIN), (BT, NB, B)) * root
    square = tl.sum(tl.sum(z * z, 2), 1) / width
    s = tl.sqrt(square) * times
    s = tl.where(s < floor, floor, s)                             # (BT,)
    step = s[:, None, None]
    u = tl.math.div_rn(z, tl.broadcast_to(step, (BT, NB, B)))
    v = snap(u, low, high, threshold, KIND)
    if MASK:
        tl.store(trusted + at + k, passes(u, v, first, last, GATE).to(tl.int8), mask=mask)
    if WHOLE == 0:
        tl.store(y + at + k, (step * v).to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(y + at + k, (v * WHOLE).to(tl.int8), mask=mask)
        tl.store(steps + token, s / WHOLE, mask=token < tokens)


@jit
def rotate(x, trusted, y, rows, root, MASK: tl.constexpr, HALF: tl.constexpr, PLAIN: tl.constexpr, BT: tl.constexpr, B: tl.constexpr):
    """y = (x M) H / sqrt(B) of (rows, B)."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    at = row.to(tl.int64)[:, None] * B + tl.arange(0, B)[None, :]
    mask = (row < rows)[:, None]
    z = tl.load(x + at, mask=mask, other=0.0)
    if MASK:
        z = tl.where(tl.load(trusted + at, mask=mask, other=0) != 0, z, 0.0)
    tl.store(y + at, (turned(z, B, HALF, PLAIN) * root).to(y.dtype.element_ty), mask=mask)


def why_not(quant: Quant, width: int, block: int) -> str:
    """Why the kernel cannot rotate and quantize so; nothing where it can."""
    if reason := why_not_snap(quant.grid, quant.estimator):
        return reason
    s = quant.scale
    if type(s) is not Rms or s.dtype != "float32" or s.sign != "positive" or s.nested is not None or s.inverse or s.gradient != "none":
        return f"{s}: the kernel's steps are Rms(times), fp32, without a gradient"
    if quant.refit or quant.clip is not None or not (isinstance(quant.grain, PerToken) or quant.grain == PerChannel()):
        return "the kernel takes rows (PerToken(), PerChannel()), without refit and clip"
    return why_not_turn(width, block) or (f"rows of {width}; the kernel holds {MOST}" if width > MOST else "")


def why_not_turn(width: int, block: int) -> str:
    """Why the kernel cannot rotate so; nothing where it can."""
    if block not in (16, 32, 64, 128, 256):
        return f"blocks of {block}; the kernel rotates 16 to 256 channels, a power of two"
    return f"a block of {block} does not divide {width} channels" if width % block else ""


def quantize(x: Tensor, quant: Quant, block: int) -> tuple[Tensor, Tensor]:
    """x (..., n) -> y of its shape and type, and M, bool: where the estimator lets a gradient pass.

    Raises:
        QuantError: `why_not`. RunError: no Triton, or no device for it.
    """
    y, trusted, _ = _run(x, quant, block, 0)
    return y, trusted


def integers(x: Tensor, quant: Quant, block: int) -> tuple[Tensor, Tensor]:
    """x (..., n) -> (..., n) int8 and steps (...) fp32, whose product is `quantize`'s y. Of half-integers twice the value, and half the step."""
    whole = 2 if isinstance(quant.grid, HalfStep) else 1
    if quant.grid.high * whole > 127 or quant.grid.low * whole < -128:
        raise QuantError(f"{quant.grid} does not fit into int8")
    y, _, steps = _run(x, quant, block, whole)
    return y, steps


def _run(x: Tensor, quant: Quant, block: int, whole: int) -> tuple[Tensor, Tensor, Tensor]:
    need(x.device)
    width = x.shape[-1]
    if reason := why_not(quant, width, block):
        raise QuantError(f"no kernel rotates and quantizes this: {reason}")
    flat = x.detach().reshape(-1, width).contiguous()
    y = torch.empty_like(flat, dtype=torch.int8 if whole else x.dtype)
    trusted = torch.empty_like(flat, dtype=torch.int8) if not whole else y
    steps = torch.empty(len(flat), dtype=torch.float32, device=x.device)
    nb = power(width // block)
    bt = max(16 // nb, 1)
    how, first, last = gate(quant.grid, quant.estimator)
    grid, scale = quant.grid, quant.scale
    if flat.numel():
        launch(rotate_quantize, (-(-len(flat) // bt),), flat, y, trusted, steps, len(flat), width, grid.low, grid.high,
               getattr(grid, "threshold", 0.0), first, last, scale.times, scale.smallest, 1 / math.sqrt(block),  # type: ignore[attr-defined]
               fuse=False, warps=4 if bt * nb * block <= 4096 else 8 if bt * nb * block <= 8192 else 16, KIND=KINDS[type(grid)], GATE=how,
               WHOLE=whole, MASK=not whole, HALF=x.dtype != torch.float32, PLAIN=INTERPRETED, BT=bt, NB=nb, B=block)
    return y.view(x.shape), trusted.view(x.shape).bool() if not whole else trusted, steps.view(x.shape[:-1])


def turn(x: Tensor, block: int, trusted: Tensor | None = None) -> Tensor:
    """(x M) H / sqrt(B), in blocks of the last axis, in the type of x."""
    need(x.device)
    if reason := why_not_turn(x.shape[-1], block):
        raise QuantError(f"no kernel rotates this: {reason}")
    flat = x.detach().reshape(-1, block).contiguous()
    y = torch.empty_like(flat)
    bt = max(4096 // block, 16)
    if flat.numel():
        mask = None if trusted is None else trusted.reshape(flat.shape).contiguous().view(torch.int8)
        launch(rotate, (-(-len(flat) // bt),), flat, mask, y, len(flat), 1 / math.sqrt(block), MASK=trusted is not None,
               HALF=x.dtype != torch.float32, PLAIN=INTERPRETED, BT=bt, B=block)
    return y.view(x.shape)


class Rotated(torch.autograd.Function):
    """x (..., n) -> y, the quantized rotation; dx = (g M) H / sqrt(B)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quant: Quant, block: int) -> Tensor:  # type: ignore[override]
        y, trusted = quantize(x, quant, block)
        ctx.block = block
        ctx.save_for_backward(trusted)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return turn(g, ctx.block, ctx.saved_tensors[0]), None, None
