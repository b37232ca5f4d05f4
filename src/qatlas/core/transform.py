"""Transform: pairs of maps with a(x) b(w)^T = x w^T, so that what is quantized is easier to quantize.

A transform is a value (`Hadamard()`, `Smooth(0.5)`, `Permute()`); `build` turns it into `Maps` for one layer, whose buffers hold what it needs:

    Hadamard   x R, w R with R orthogonal: spreads outliers over all channels. R = D (H_K x H_2^m) / sqrt(n), D random signs when `seed` is given
    Smooth     x / s, w s with s_j = max|x_j|^alpha / max|w_j|^(1-alpha): moves the difficulty of activations into weights (SmoothQuant)
    Permute    the input channels in descending order of max|x_j|: groups then hold channels of like size
    Chain      several, the first one first

Sources: QuaRot (arXiv 2404.00456), SmoothQuant (arXiv 2211.10438). Widths without a Hadamard matrix (hadamard.py) are refused; `block` rotates inside
blocks instead. Layers that read the same tensor (query, key and value; gate and up) and rotate it alike rotate it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .error import QuantError
from .hadamard import hadamard, odd_order
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
    """block: rotate blocks of that many channels (None: all of them at once). most: in place of it the largest power of two that divides the
    channels, up to this one, so that one value serves layers of any width. seed: random signs, stored with the layer; None: plain.

    >>> maps = Hadamard().build(torch.eye(4))
    >>> maps.of_input(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    block: int | None = None
    seed: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if self.most is not None and (self.block is not None or self.most < 2 or self.most & (self.most - 1)):
            raise QuantError(f"Hadamard(block={self.block}, most={self.most}): most is a power of two from 2 on, in place of block")

    def build(self, weight: Tensor, peak: Tensor | None = None) -> Maps:
        n = weight.shape[1]
        block = n if self.block is None else self.block
        if self.most is not None:
            block = min(n & -n, self.most)
            if block == 1:
                raise QuantError(f"Hadamard(most={self.most}) rotates nothing of a layer with {n} inputs: no power of two divides them; give "
                                 "that layer a rule with transform=None")
        if n % block:
            raise QuantError(f"Hadamard(block={block}) does not divide the {n} inputs of a layer")
        signs = torch.ones(n)
        if self.seed is not None:
            signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(self.seed)) * 2.0 - 1
        return Rotate(block, signs.to(weight.device, weight.dtype))


class Rotated(NamedTuple):
    """A tensor's rotation in blocks, and how often both had been written."""

    value: Tensor
    block: int
    written: int
    answered: int

    def of(self, block: int, x: Tensor) -> bool:
        """Whether it is that of x as it is now."""
        return block == self.block and (x._version, self.value._version) == (self.written, self.answered)


class Rotate(Maps):
    """Hadamard's. turn: what multiplies the last axis by the matrix; kernels/rotation.py has a faster one."""

    signs: Tensor

    def __init__(self, block: int, signs: Tensor) -> None:
        super().__init__()
        self.turn: Callable[..., Tensor] = hadamard
        self.block, self.plain = block, bool((signs == 1).all())
        odd_order(block)                                          # refuses here, not in the first forward
        self.register_buffer("signs", signs)

    def of_input(self, x: Tensor) -> Tensor:
        """Rotated once for all that read x: the answer stays on it. (Leaves live on, and hold nothing; a rotation saves nothing for backward, so x
        holds no memory but the answer's.)"""
        if not self.plain or x.is_leaf or torch.compiler.is_compiling():
            return self.of_weight(x)
        same = getattr(x, "_rotated", None)
        if same is None or not same.of(self.block, x):
            y = self.of_weight(x)
            same = x._rotated = Rotated(y, self.block, x._version, y._version)  # type: ignore[attr-defined]
        return same.value

    def of_weight(self, w: Tensor) -> Tensor:
        w = w if self.plain else w * self.signs
        return self.turn(w.unflatten(-1, (-1, self.block))).flatten(-2)

    def back(self, w: Tensor) -> Tensor:
        return self.turn(w.unflatten(-1, (-1, self.block)), transpose=True).flatten(-2) * self.signs


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
