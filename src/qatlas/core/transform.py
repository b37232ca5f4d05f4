"""Transform: pairs of maps with a(x) b(w)^T = x w^T, so that what is quantized is easier to quantize.

A transform is a value (`Hadamard()`, `Smooth(0.5)`, `Permute()`); `build` turns it into `Maps` for one layer, whose buffers hold what it needs:

    Hadamard   x R, w R with R orthogonal: spreads outliers over all channels. R = D (H_K x H_2^m) / sqrt(n), D random signs when `seed` is given
    Smooth     x / s, w s with s_j = max|x_j|^alpha / max|w_j|^(1-alpha): moves the difficulty of activations into weights (SmoothQuant)
    Permute    the input channels in descending order of max|x_j|: groups then hold channels of like size
    Chain      several, the first one first

Sources: QuaRot (arXiv 2404.00456), SmoothQuant (arXiv 2211.10438). Hadamard matrices of order K that is no power of two are made by Paley's two
constructions (K = q + 1 and K = 2 (q + 1), q prime), not copied from tables: they are Hadamard but not the tabulated ones. Orders without one (no
factor K 2^m) are refused; `block` rotates inside blocks instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .error import QuantError
from .noun import Noun


class Maps(nn.Module):
    """What a transform does to one layer. This one does nothing."""

    def of_input(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., in)."""
        return x

    def of_weight(self, w: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        return w

    def back(self, w: Tensor) -> Tensor:
        """The inverse of `of_weight`: (out, in) -> (out, in) in the weight's own space."""
        return w


@dataclass(frozen=True)
class Transform(Noun):
    """The interface. `needs_peak` says whether `build` wants calibration's max|x| of each input channel."""

    @property
    def needs_peak(self) -> bool:
        return False

    def build(self, weight: Tensor, peak: Tensor | None = None) -> Maps:
        """weight (out, in), peak (in,) -> the maps of this layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hadamard(Transform):
    """block: rotate blocks of that many channels (None: all of them at once). seed: random signs, stored with the layer; None: plain.

    >>> maps = Hadamard().build(torch.eye(4))
    >>> maps.of_input(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    block: int | None = None
    seed: int | None = None

    def build(self, weight: Tensor, peak: Tensor | None = None) -> Maps:
        n = weight.shape[1]
        block = n if self.block is None else self.block
        if n % block:
            raise QuantError(f"Hadamard(block={block}) does not divide the {n} inputs of a layer")
        signs = torch.ones(n)
        if self.seed is not None:
            signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(self.seed)) * 2.0 - 1
        return _Rotate(block, signs.to(weight.device, weight.dtype))


class _Rotate(Maps):
    signs: Tensor

    def __init__(self, block: int, signs: Tensor) -> None:
        super().__init__()
        self.block, self.plain = block, bool((signs == 1).all())
        odd_order(block)                                          # refuses here, not in the first forward
        self.register_buffer("signs", signs)

    def of_input(self, x: Tensor) -> Tensor:
        x = x if self.plain else x * self.signs
        return hadamard(x.unflatten(-1, (-1, self.block))).flatten(-2)

    def of_weight(self, w: Tensor) -> Tensor:
        return self.of_input(w)

    def back(self, w: Tensor) -> Tensor:
        return hadamard(w.unflatten(-1, (-1, self.block)), transpose=True).flatten(-2) * self.signs


@dataclass(frozen=True)
class Smooth(Transform):
    """alpha 0 equalises the weights, 1 the activations; 0.5 shares. Both maxima are at least 1e-5."""

    alpha: float = 0.5

    @property
    def needs_peak(self) -> bool:
        return True

    def build(self, weight: Tensor, peak: Tensor | None = None) -> Maps:
        if peak is None:
            raise QuantError("Smooth needs calibration data: max|x| of each input channel")
        heavy = weight.abs().amax(0).clamp(min=1e-5)              # (in,)
        return _Stretch(peak.to(weight).clamp(min=1e-5).pow(self.alpha) / heavy.pow(1 - self.alpha))


class _Stretch(Maps):
    s: Tensor

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.register_buffer("s", s)

    def of_input(self, x: Tensor) -> Tensor:
        return x / self.s

    def of_weight(self, w: Tensor) -> Tensor:
        return w * self.s

    def back(self, w: Tensor) -> Tensor:
        return w / self.s


@dataclass(frozen=True)
class Permute(Transform):
    """Input channels by descending max|x|."""

    @property
    def needs_peak(self) -> bool:
        return True

    def build(self, weight: Tensor, peak: Tensor | None = None) -> Maps:
        if peak is None:
            raise QuantError("Permute needs calibration data: max|x| of each input channel")
        return _Reorder(peak.argsort(descending=True, stable=True).to(weight.device))


class _Reorder(Maps):
    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def of_input(self, x: Tensor) -> Tensor:
        return x[..., self.order]

    def of_weight(self, w: Tensor) -> Tensor:
        return w[:, self.order]

    def back(self, w: Tensor) -> Tensor:
        return w[:, self.order.argsort()]


@dataclass(frozen=True)
class Chain(Transform):
    """Several transforms, the first one first."""

    parts: tuple[Transform, ...] = ()

    @property
    def needs_peak(self) -> bool:
        return any(part.needs_peak for part in self.parts)

    def build(self, weight: Tensor, peak: Tensor | None = None) -> Maps:
        links: list[Maps] = []
        for part in self.parts:
            links.append(part.build(weight, peak))
            weight = links[-1].of_weight(weight)
            if peak is not None and not isinstance(part, Hadamard):
                peak = links[-1].of_input(peak)
        return _Chain(links)


class _Chain(Maps):
    def __init__(self, links: list[Maps]) -> None:
        super().__init__()
        self.links: Any = nn.ModuleList(links)

    def of_input(self, x: Tensor) -> Tensor:
        for link in self.links:
            x = link.of_input(x)
        return x

    def of_weight(self, w: Tensor) -> Tensor:
        for link in self.links:
            w = link.of_weight(w)
        return w

    def back(self, w: Tensor) -> Tensor:
        for link in reversed(self.links):
            w = link.back(w)
        return w


def hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """x (..., n) -> x (H_K kron H_2^m) / sqrt(n), K the slow index; its own inverse for K = 1, else the transpose is. Differentiable; n log n for the
    power of two.

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    n = x.shape[-1]
    order = odd_order(n)
    y = x.reshape(*x.shape[:-1], order, n // order)
    h = 1
    while h < n // order:
        pairs = y.unflatten(-1, (-1, 2, h))                       # (..., K, blocks, 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        h *= 2
    if order > 1:
        matrix = _paley(order).to(y)
        y = torch.einsum("ij,...jn->...in", matrix if transpose else matrix.T, y)
    return y.reshape(x.shape) / math.sqrt(n)


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
