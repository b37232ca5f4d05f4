"""Grain: where one scale serves.

A grain lays a tensor out as (..., n), where the last axis holds exactly the elements that share one scale, and puts it back. All arithmetic of scales
then reduces over the last axis, whatever the grain, and a scale has the shape of the view without that axis.

    grain           x                view                       scale
    PerTensor       any              (1, numel)                 (1,)
    PerChannel()    (out, ...)       (out, rest)                (out,)
    PerToken        (..., d)         (..., d)                   (...)
    Group(32)       (out, in)        (out, in/32, 32)           (out, in/32)
    Scattered(32)   (out, in)        (out, in/32, 32)           (out, in/32)
    Block(16, 16)   (out, in)        (out/16, in/16, 256)       (out/16, in/16)

A convolution's weight (out, in, kh, kw) is taken as (out, in kh kw) by Group and Block. A group that does not divide is an error, never padded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .error import QuantError
from .noun import Noun


@dataclass(frozen=True)
class Grain(Noun):
    """The interface: `view` and its inverse `back`."""

    def view(self, x: Tensor) -> Tensor:
        """(any) -> (..., n); the last axis shares a scale. A view where memory allows."""
        raise NotImplementedError

    def back(self, y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The inverse of `view` for a tensor that had `shape`."""
        return y.reshape(shape)

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of `shape`."""
        return tuple(self.view(torch.empty(tuple(shape), device="meta")).shape[:-1])

    @property
    def tall(self) -> int:
        """Rows under one scale, where it is not one or all."""
        return 1

    def of_rows(self, steps: Tensor, at: Tensor | slice) -> Tensor | None:
        """The scales of the rows `at` of a tensor (two axes or more), as this grain shows those rows alone; None where they are not told apart."""
        return steps[at]


@dataclass(frozen=True)
class PerTensor(Grain):
    """One scale for all."""

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(1, x.numel())                            # -1 would fail on an empty tensor

    def of_rows(self, steps: Tensor, at: Tensor | slice) -> Tensor | None:
        return steps


@dataclass(frozen=True)
class PerChannel(Grain):
    """One scale for each index of `axis`: 0 is a weight's output channel, -1 an activation's feature."""

    axis: int = 0

    def view(self, x: Tensor) -> Tensor:
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def back(self, y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        axis = self.axis % len(shape)
        front = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return y.reshape(front).movedim(0, axis)

    def of_rows(self, steps: Tensor, at: Tensor | slice) -> Tensor | None:
        return steps[at] if self.axis == 0 else steps if self.axis > 0 or self.axis == -1 else None


@dataclass(frozen=True)
class PerToken(Grain):
    """One scale for each vector along the last axis; only dynamic scales can use it, since their number changes with the input."""

    def view(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Group(Grain):
    """One scale for `size` neighbours along the input axis."""

    size: int

    def view(self, x: Tensor) -> Tensor:
        width = x[0].numel() if x.dim() > 1 else x.numel()
        if self.size < 1 or width % self.size:
            good = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
            raise QuantError(f"a group of {self.size} does not divide the {width} inputs of a tensor of shape {tuple(x.shape)}; "
                             f"sizes that do: {', '.join(map(str, good)) or 'none of 16..256, take per channel'}")
        return x.reshape(x.shape[0] if x.dim() > 1 else 1, width // self.size, self.size)


@dataclass(frozen=True)
class Scattered(Grain):
    """One scale for `size` inputs that need not be neighbours: those at order[0 : size], then those at order[size : 2 size], ... GPTQ with desc_act
    sorts inputs by their activations and groups them in that order. An empty order is that of Group.

    >>> Scattered(2, (0, 2, 1, 3)).view(torch.tensor([[10, 11, 12, 13]]))
    tensor([[[10, 12],
             [11, 13]]])
    """

    size: int
    order: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not all(type(i) is int for i in self.order) or sorted(self.order) != list(range(len(self.order))):
            raise QuantError(f"Scattered takes each of the inputs 0 .. {len(self.order) - 1} once; this order does not")

    def view(self, x: Tensor) -> Tensor:
        width = x[0].numel() if x.dim() > 1 else x.numel()
        if self.order and len(self.order) != width:
            raise QuantError(f"an order of {len(self.order)} inputs cannot group the {width} inputs of a tensor of shape {tuple(x.shape)}")
        return Group(self.size).view(x.reshape(-1, width)[:, _index(self.order, x.device)[0]] if self.order else x)

    def back(self, y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        flat = y.reshape(shape[0] if len(shape) > 1 else 1, -1)
        return (flat[:, _index(self.order, y.device)[1]] if self.order else flat).reshape(shape)


@lru_cache(maxsize=64)
def _index(order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The order and its inverse."""
    there = torch.tensor(order, device="cpu")
    return there.to(device), there.argsort().to(device)


@dataclass(frozen=True)
class Block(Grain):
    """One scale for each tile of `rows` x `cols`."""

    rows: int
    cols: int

    @property
    def tall(self) -> int:
        return self.rows

    def view(self, x: Tensor) -> Tensor:
        n, k = x.shape[0], x[0].numel()
        if n % self.rows or k % self.cols:
            raise QuantError(f"blocks of {self.rows} x {self.cols} do not tile a tensor of shape {tuple(x.shape)}")
        tiles = x.reshape(n // self.rows, self.rows, k // self.cols, self.cols).transpose(1, 2)
        return tiles.reshape(n // self.rows, k // self.cols, self.rows * self.cols)

    def back(self, y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return y.reshape(*y.shape[:2], self.rows, self.cols).transpose(1, 2).reshape(shape)

    def of_rows(self, steps: Tensor, at: Tensor | slice) -> Tensor | None:
        if not isinstance(at, slice) or at.start % self.rows or at.stop % self.rows:
            return None
        return steps[at.start // self.rows : at.stop // self.rows]
