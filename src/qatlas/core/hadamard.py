"""The Hadamard transform of a tensor's last axis, and which orders there are.

A Hadamard matrix of order K that is no power of two is made by Paley's two constructions (K = q + 1 and K = 2 (q + 1), q prime), not copied from
tables: it is Hadamard but not the tabulated one. Orders without one (no factor K 2^m) are refused.

The power of two is multiplied out sixteen channels at a time, H_128 = H_8 kron H_16: as many passes over memory as there are factors, in place of
one for each doubling (six times as slow on CPU), with a fifth of the arithmetic of one dense H_128 (twice as slow). On CPU some rows go through all
products before the next ones do: what lies between stays in the cache, and only the answer is fresh memory (else four times as slow at 8 MB).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .error import QuantError

FACTOR = 16                                                       # channels that one product rotates
CHUNK = 2**18                                                     # elements that go through all products at a time


def hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """x (..., n) -> x (H_K kron H_2^m) / sqrt(n), K the slow index; its own inverse for K = 1, else the transpose is. Its gradient is the transpose
    of what arrives, and nothing is saved for it.

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    odd_order(x.shape[-1])
    y: Tensor = _Turn.apply(x, transpose)
    return y


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transpose: bool) -> Tensor:  # type: ignore[override]
        ctx.transpose = transpose
        return _turned(x, transpose)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return hadamard(g, not ctx.transpose), None


def _turned(x: Tensor, transpose: bool) -> Tensor:
    n = x.shape[-1]
    order, width, factors = odd_order(n), 1, []
    while width * order < n:
        factors.append(_sylvester(min(FACTOR, n // order // width), x.dtype, x.device))
        width *= len(factors[-1])
    if order > 1:
        matrix = _paley(order).to(x) / math.sqrt(order)
        factors.append(matrix if transpose else matrix.T)
    rows = x.reshape(x.numel() // n, n).contiguous()
    out, step = torch.empty_like(rows), max(1, CHUNK // n) if x.device.type == "cpu" else max(1, len(rows))
    spare = [torch.empty_like(rows[:step]) for _ in factors[1:3]]
    with torch.autocast(x.device.type, enabled=False):            # else a master would be rotated in bf16
        for first in range(0, len(rows), step):
            _multiply(rows[first : first + step], factors, out[first : first + step], spare)
    return (out if factors else rows.clone()).reshape(x.shape)


def _multiply(y: Tensor, factors: list[Tensor], out: Tensor, spare: list[Tensor]) -> None:
    """(rows, n) times the factors' product, the last factor the slowest index, into out."""
    width = 1
    for i, matrix in enumerate(factors):
        part, to = len(matrix), out if i == len(factors) - 1 else spare[i % 2][: len(y)]
        if width == 1:
            torch.mm(y.view(-1, part), matrix.T, out=to.view(-1, part))
        else:
            blocks = y.view(-1, part, width)
            torch.bmm(matrix.expand(len(blocks), part, part), blocks, out=to.view(blocks.shape))
        y, width = to, width * part


@lru_cache(maxsize=64)
def _sylvester(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, n) of +-1 / sqrt(n)."""
    i = torch.arange(n)
    bits = torch.tensor([int(k).bit_count() % 2 for k in (i[:, None] & i[None, :]).flatten()]).reshape(n, n)
    return ((1 - 2 * bits).double() / math.sqrt(n)).to(device, dtype)


def odd_order(n: int) -> int:
    """K with n = K 2^m for which a Hadamard matrix of order K can be made; the smallest such.

    Raises:
        QuantError: no such K.
    """
    k = n // (n & -n)
    while k <= n:
        if n % k == 0 and (k == 1 or _paley_prime(k) is not None):
            return k
        k *= 2
    raise QuantError(f"no Hadamard matrix of order {n} can be made; take Hadamard(block={n & -n}), the largest power of two that divides it")


def _paley_prime(order: int) -> tuple[int, int] | None:
    """(kind, q) of Paley's construction for this order."""
    for kind, q, rest in ((1, order - 1, 3), (2, order // 2 - 1, 1)):
        if order % 4 == 0 and q > 2 and q % 4 == rest and all(q % d for d in range(2, math.isqrt(q) + 1)):
            return kind, q
    return None


@lru_cache(maxsize=16)
def _paley(order: int) -> Tensor:
    """(K, K) of +-1 with H H^T = K I."""
    kind, q = _paley_prime(order)  # type: ignore[misc]
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    core = chi[(i[:, None] - i[None, :]) % q]
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:], border[1:, 0], border[1:, 1:] = 1, -1 if kind == 1 else 1, core
    if kind == 1:
        return border + torch.eye(q + 1, dtype=torch.float64)
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, a) + torch.kron(torch.eye(q + 1, dtype=torch.float64), b)
