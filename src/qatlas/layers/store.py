"""Store: one QTensor as the state of a module. What packed layers hold in the place of a weight.

Packed codes are uint8 buffers, the scale is a Parameter (so that scales can be trained on a packed model) or, for two-level scales, another Store,
and zero and offset are buffers or a Store. `MaskedStore` holds a composite: a mask in bits, and the codes of each part where it is taken.

A file that is loaded is mapped, and a Store's tensors lie in it: codes as they are, a scale in the narrow type in which it is stored. It is widened,
in place, when it is first asked for with a graph or goes into training: masters are fp32. What is computed from it is the same either way.

Values are needed for the length of a product. Without a graph they are made by blocks of rows in the tensor that they shall stand in, so that one
weight, and no second one, exists in floating point. `rows` makes those of some rows and no others: a look-up in a table.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.noun import from_json
from ..core.qtensor import Masked, QTensor, pack_bits, straight, unpack_bits
from ..core.stored import rounded

BLOCK = 2**18                                                     # elements that are dequantized at a time: they fit in a core's cache


class Store(nn.Module):
    """One QTensor as a module's state."""

    codes: Tensor
    scale: Tensor | Store
    zero: Tensor | None
    offset: Tensor | Store | None

    def __init__(self, q: QTensor) -> None:
        super().__init__()
        self.grid, self.grain, self.shape, self.scale_dtype = q.grid, q.grain, tuple(q.shape), q.scale_dtype
        self.register_buffer("codes", pack_bits(q.codes, q.bits))
        self.scale = Store(q.scale) if isinstance(q.scale, QTensor) else nn.Parameter(q.scale.detach().float().clone())
        for name in ("zero", "offset"):
            value = getattr(q, name)
            if isinstance(value, QTensor):
                self.offset = Store(value)
                continue
            self.register_buffer(name, None if value is None else value.detach().float().clone())

    @property
    def bits(self) -> float:
        """Bits of a code."""
        return self.grid.bits

    def qtensor(self) -> QTensor:
        """The QTensor, its scale still on the graph, rounded to the type in which it is stored (training moves it between two such numbers)."""
        return self._around(unpack_bits(self.codes, self.grid.bits, self.shape))

    def _around(self, codes: Tensor) -> QTensor:
        scale = self.scale.qtensor() if isinstance(self.scale, Store) else straight(self._step(), partial(rounded, dtype=self.scale_dtype))
        offset = self.offset.qtensor() if isinstance(self.offset, Store) else self.offset
        return QTensor(codes, scale, self.zero, offset, self.grid, self.grain, self.scale_dtype)

    def _step(self) -> Tensor:
        step: Any = self.scale
        if torch.is_grad_enabled() and step.requires_grad and not torch.compiler.is_compiling():
            self.widen()
        return step if step.dtype.itemsize >= 4 else step.float()

    def widen(self) -> None:
        """A scale that lies as it is stored becomes fp32. In place: it stays the Parameter that an optimizer may hold."""
        if isinstance(self.scale, nn.Parameter) and self.scale.dtype.itemsize < 4 and not self.scale.is_meta:
            self.scale.data = self.scale.data.float()

    def train(self, mode: bool = True) -> Store:
        """As nn.Module.train; masters are fp32."""
        if mode:
            self.widen()
        return super().train(mode)

    def rows(self, at: Tensor | slice) -> QTensor | None:
        """Some rows as a QTensor of their own, by their numbers or from one to another; None where there are none, or their scales
        are not told apart from others'."""
        return self._part(at, self._around(self.codes))

    def _part(self, at: Tensor | slice, whole: QTensor) -> QTensor | None:
        """whole: as `_around` gives it, its codes packed."""
        if len(self.shape) < 2:
            return None
        codes = whole.codes[at] if isinstance(at, slice) else whole.codes.index_select(0, at)      # which refuses what lies outside
        given = (whole.steps, whole.zero, whole.offsets)
        scale, zero, offset = (t if t is None else self.grain.of_rows(t, at) for t in given)
        if scale is None or not codes.shape[0]:
            return None
        codes = unpack_bits(codes, int(self.grid.bits), (codes.shape[0], *self.shape[1:]))
        return QTensor(codes, scale, zero, offset, self.grid, self.grain, self.scale_dtype)

    @torch.no_grad()
    def places(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Steps, zeros and offsets as plain fp32 tensors; the steps are the scale itself where it lies so."""
        whole, held = self._around(self.codes), self.scale
        same = isinstance(held, nn.Parameter) and held.dtype == torch.float32 and torch.equal(held, whole.steps)
        return held.detach() if same else whole.steps, whole.zero, whole.offsets  # type: ignore[operator]

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor itself, made block by block; dtype: None is that of the scale."""
        few = max(BLOCK // max(math.prod(self.shape[1:]), 1) // self.grain.tall, 1) * self.grain.tall
        whole = self._around(self.codes)
        whole.scale, whole.offset = whole.steps, whole.offsets    # nested ones once, not block by block
        if few >= self.shape[0] or self._part(slice(0, few), whole) is None:
            w = self.qtensor().dequantize()
            return w.to(dtype or w.dtype)
        out = torch.empty(self.shape, dtype=dtype or whole.steps.dtype, device=self.codes.device)
        for start in range(0, self.shape[0], few):
            at = slice(start, min(start + few, self.shape[0]))
            out[at] = self._part(at, whole).dequantize()          # type: ignore[union-attr]
        return out

    def to_meta(self) -> dict[str, Any]:
        """As QTensor.to_meta, and which of zero and offset there is."""
        return self.qtensor().to_meta() | {"kind": "zero" if self.zero is not None else "offset" if self.offset is not None else "plain"}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Store:
        """An empty Store of the right shapes."""
        return cls(blank(meta))


class Taken(Store):
    """One part of a composite: codes where its mask is True, in the order of rows, and no others. codes (n,) uint8; the rest as in the whole q."""

    def __init__(self, q: QTensor, codes: Tensor) -> None:
        super().__init__(q)
        self.register_buffer("codes", pack_bits(codes, q.bits))

    def among(self, mask: Tensor) -> QTensor:
        """The QTensor of the whole shape; where the mask is False its codes are 0."""
        codes = unpack_bits(self.codes, self.grid.bits, (int(mask.sum()),))
        return self._around(torch.zeros(self.shape, dtype=torch.uint8, device=codes.device).masked_scatter_(mask, codes))


class MaskedStore(nn.Module):
    """One Masked as a module's state: `mask` in bits, the codes of each part where it is taken."""

    mask: Tensor
    scale_dtype = "float32"

    def __init__(self, mask: Tensor, one: Taken, other: Taken) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.one, self.other, self.shape = one, other, one.shape
        self.grid, self.grain = other.grid, other.grain

    @classmethod
    def of(cls, q: Masked) -> MaskedStore:
        """From the data."""
        return cls(pack_bits(q.mask, 1), Taken(q.one, q.one.codes[q.mask]), Taken(q.other, q.other.codes[~q.mask]))

    @property
    def bits(self) -> float:
        """Bits an element: both parts' codes and the mask."""
        return 8 * sum(t.numel() for t in (self.mask, self.one.codes, self.other.codes)) / max(math.prod(self.shape), 1)

    def qtensor(self) -> Masked:
        """As Store.qtensor."""
        mask = unpack_bits(self.mask, 1, self.shape).bool()
        return Masked(mask, self.one.among(mask), self.other.among(~mask))

    def rows(self, at: Tensor | slice) -> None:
        """As Store.rows: the codes of a part stand one behind the other, and a row's are not found without those before it."""

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """As Store.values, not by blocks."""
        with torch.no_grad():
            w = self.qtensor().dequantize()
        return w.to(dtype or w.dtype)

    def to_meta(self) -> dict[str, Any]:
        """Both parts', and how many elements the first has."""
        count = int(unpack_bits(self.mask, 1, self.shape).sum())
        mask = torch.zeros(self.shape, dtype=torch.bool)
        parts = {name: Store.to_meta(_Whole(part, mask)) for name, part in (("one", self.one), ("other", self.other))}  # type: ignore[arg-type]
        return {"shape": list(self.shape), "count": count, **parts}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> MaskedStore:
        """An empty one of the right shapes."""
        shape, count = tuple(meta["shape"]), int(meta["count"])
        whole = math.prod(shape)
        if not 0 <= count <= whole:
            raise ValueError(f"{count} of {whole} elements")
        parts = [Taken(blank(meta[name]), torch.zeros(n, dtype=torch.uint8)) for name, n in (("one", count), ("other", whole - count))]
        return cls(pack_bits(torch.zeros(shape, dtype=torch.uint8), 1), *parts)


class _Whole:
    """A part as `Store.to_meta` looks at it."""

    def __init__(self, part: Taken, mask: Tensor) -> None:
        self.zero, self.offset, self.qtensor = part.zero, part.offset, lambda: part._around(mask.to(torch.uint8))


def stored(q: QTensor | Masked) -> Any:
    """The module that holds it."""
    return MaskedStore.of(q) if isinstance(q, Masked) else Store(q)


def blank(meta: dict[str, Any]) -> QTensor:
    grid, grain, shape = from_json(meta["grid"]), from_json(meta["grain"]), tuple(meta["shape"])
    steps = grain.scale_shape(shape)
    scale = blank(meta["scale"]) if "scale" in meta else torch.ones(steps)
    zero, plain = (torch.zeros(steps) if meta.get("kind") == name else None for name in ("zero", "offset"))
    offset = blank(meta["offset"]) if "offset" in meta else plain
    return QTensor(torch.zeros(shape, dtype=torch.uint8), scale, zero, offset, grid, grain, meta["scale_dtype"])
