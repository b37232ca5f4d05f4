"""Key/value cache of codes: keys and values are quantized once, where they are made, and stored packed.

A full-precision cache of a model whose attention quantizes keys and values holds numbers that no engine will hold, and every step quantizes all of
them again. Here `update` quantizes what is new, by the attention module's own `key_quantizer` and `value_quantizer`, appends codes and scales, and
gives the whole back dequantized, marked: attention lets what is marked pass (attention.py). So training, prefill, decoding and generation compute
with the same numbers bit for bit, since `Quantizer.quantize` and its forward are one formula (law 1).

    codes    (B, G, S, bytes)     packed along the features of one head: ceil(d bits / 8) bytes a token
    scale    (B, G, S) or (B, G, S, d / group), in the type that the Quant declares (fp16 in a scheme); an integer zero point in one byte
    a learned scale (one for the tensor, for each head or each feature) is the quantizer's own: only codes are stored

At 4 bits and d = 64 that is 34 bytes a token and head, where bf16 takes 128 and fp32 256.

Every step reads all tokens, so it dequantizes all of them: memory is the reason for such a cache. Who has memory and no time says keep="values": what
was dequantized once stays beside the codes, in the type of the model, and a step dequantizes its own tokens only. The same bits either way.

A scale measured afresh must belong to one token: one for many tokens would move when the next arrives, and what is stored could not stay. Such a
Quant is refused here; so are gradients, which do not pass codes. A sliding window keeps its last tokens as transformers' own layer does. Beams,
repeated and selected rows, cropping act on codes and scales alike: nothing is dequantized for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..core.error import QuantError
from ..core.grain import Group, PerChannel, PerTensor, PerToken
from ..core.qtensor import QTensor, pack_bits, unpack_bits
from ..core.quantizer import Quant, Quantizer
from .attention import HANDED, NAME, STORED, attached

SIDES = ("key", "value")
KEEPS = ("codes", "values")


def why_not(quant: Quant) -> str | None:
    """Why a cache cannot store tokens by this Quant; None where it can.

    >>> from qatlas.core.grid import Uniform; from qatlas.core.scale import AbsMax
    >>> why_not(Quant(Uniform(4), PerToken(), AbsMax())) is None, "moves" in why_not(Quant(Uniform(4), PerTensor(), AbsMax()))
    (True, True)
    """
    if quant.scale.nested is not None or quant.scale.offset_nested is not None:
        return "its scales are quantized themselves, in blocks that run over tokens"
    if quant.scale.keeps == "nothing":
        own = isinstance(quant.grain, PerToken | Group)
        return None if own else f"{quant.grain} has one scale for many tokens, measured afresh: the next moves it. Write PerToken(), or Learned(...)"
    fixed = isinstance(quant.grain, PerTensor) or (isinstance(quant.grain, PerChannel) and quant.grain.axis in (1, 3, -1, -3))
    return None if fixed else f"{quant.grain} has another scale for each token, and tokens come and go"


class Codes:
    """Keys, or values, of one layer: (B, G, S, d), growing along S. Without a quantizer they are stored as they are."""

    def __init__(self, quantizer: Quantizer | None, keep: str = "codes") -> None:
        self.quantizer, self.keep = quantizer, keep
        self.seen: Tensor | None = None                           # what was dequantized, where values are kept
        self.parts: dict[str, Tensor] = {}                        # name -> (B, G, S, ...)
        self.fixed: QTensor | None = None                         # grid, grain, and the scale where it is the quantizer's own
        self.width, self.dtype = 0, torch.float32

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        other = Codes(self.quantizer)                             # a copied cache belongs to the same model
        other.__dict__.update(self.__dict__, parts=copy.deepcopy(self.parts, memo), seen=None if self.seen is None else self.seen.clone())
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(t.numel() * t.element_size() for t in (*self.parts.values(), *(() if self.seen is None else (self.seen,))))

    def append(self, x: Tensor) -> None:
        """Quantize and store (B, G, new, d).

        Raises:
            QuantError: gradients that would end here, a quantizer that has been switched off or changed since the first token.
        """
        new = {"full": x} if self.quantizer is None else self._quantize(x, self.quantizer)
        self.width, self.dtype = x.shape[-1], x.dtype
        if self.keep == "values" and self.quantizer is not None:
            fresh = self._values(new)
            self.seen = fresh if self.seen is None else torch.cat([self.seen, fresh], 2)
        self.parts = new if not self.parts else {name: torch.cat([t, new[name]], 2) for name, t in self.parts.items()}

    def dequantize(self) -> Tensor | None:
        """All that is stored, (B, G, S, d), in the type of the model; None where nothing is."""
        if not self.parts:
            return None
        if self.quantizer is None:
            return self.parts["full"]
        return self.mark(self._values(self.parts) if self.seen is None else self.seen)

    def _values(self, parts: dict[str, Tensor]) -> Tensor:
        first = self.fixed
        assert first is not None
        shape = (*parts["codes"].shape[:3], self.width)
        scale, zero, offset = (getattr(first, name) if (t := parts.get(name)) is None else self._shaped(t, shape)
                               for name in ("scale", "zero", "offset"))
        q = QTensor(unpack_bits(parts["codes"], first.bits, shape), scale, zero, offset, first.grid, first.grain)
        return q.dequantize().to(self.dtype)

    def mark(self, x: Tensor) -> Tensor:
        """x, known to attention as stored by this Quant."""
        if self.quantizer is not None:
            setattr(x, STORED, self.quantizer.quant)
        return x

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change rows or tokens of all that is stored."""
        self.parts = {name: change(t) for name, t in self.parts.items()}
        self.seen = None if self.seen is None else change(self.seen)

    def _quantize(self, x: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        if torch.is_grad_enabled() and x.requires_grad:
            raise QuantError("a cache of codes passes no gradient on to the keys and values in it; compute under torch.no_grad(), or train without a "
                             "cache (use_cache=False)")
        if not quantizer.on or quantizer._seen is not None:
            raise QuantError("a quantizer of keys or values is switched off or being calibrated, and the cache stores its codes; take a "
                             "full-precision cache: past_key_values=DynamicCache()")
        q = quantizer.quantize(x)
        if not isinstance(q, QTensor) or isinstance(q.scale, QTensor) or isinstance(q.offset, QTensor):
            raise QuantError(f"a cache stores one code and one scale for each value, and {type(quantizer).__name__} gives more than that")
        place = {name: t for name in ("scale", "zero", "offset") if (t := getattr(q, name)) is not None}
        if self.fixed is not None and not self._same(q):
            raise QuantError("the quantizer of a cache was changed between two tokens; make the cache anew after training or switching bits")
        if self.fixed is None:
            self.fixed = replace(q, codes=q.codes[:0])
        new = {"codes": pack_bits(q.codes, q.bits)}
        if quantizer.quant.scale.keeps != "nothing":
            return new
        kinds = {"scale": getattr(torch, q.scale_dtype), "zero": torch.uint8 if q.grid.low >= 0 else torch.int8,
                 "offset": getattr(torch, quantizer.quant.scale.offset_dtype)}
        return new | {name: _narrow(_listed(t, x, q.grain), kinds[name]) for name, t in place.items()}

    def _same(self, q: QTensor) -> bool:
        first = self.fixed
        assert first is not None and self.quantizer is not None
        fixed = self.quantizer.quant.scale.keeps == "nothing" or torch.equal(q.steps, first.steps)
        return (q.grid, q.grain) == (first.grid, first.grain) and fixed

    def _shaped(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse."""
        assert self.fixed is not None
        t = t if t.dtype == torch.float64 else t.float()
        return t if isinstance(self.fixed.grain, PerToken) else t.reshape(self.fixed.grain.scale_shape(shape))


def _listed(t: Tensor, x: Tensor, grain: Any) -> Tensor:
    """Scales as the grain has them -> by token, (B, G, S) or (B, G, S, groups)."""
    if isinstance(grain, PerToken):
        return t
    if x.shape[3] % grain.size:
        raise QuantError(f"a group of {grain.size} runs over several heads or tokens: {x.shape[3]} features a head take a group that divides them")
    return t.reshape(*x.shape[:3], x.shape[3] // grain.size)


def _narrow(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In the smaller type where that loses nothing. (Joined to what is wider, it becomes that again.)"""
    small = t.to(dtype)
    return small if torch.equal(small.to(t.dtype), t) else t


class KeyValues(CacheLayerMixin):
    """One layer of the cache. window: how many tokens a query sees, itself included; None is all. keep: codes, or values beside them."""

    is_sliding = False

    def __init__(self, module: nn.Module, window: int | None = None, keep: str = "codes") -> None:
        if keep not in KEEPS:
            raise QuantError(f"keep={keep!r}: a cache keeps {' or '.join(KEEPS)}")
        held = attached(module)
        self.module, self.window, self.is_sliding = module, window, window is not None
        self.sides = tuple(Codes(q if (q := held.get(side)) is not None and q.on else None, keep) for side in SIDES)
        self.length, self.is_initialized, self.record_past = 0, False, False

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyValues:
        other = KeyValues.__new__(KeyValues)
        other.__dict__.update(self.__dict__, sides=copy.deepcopy(self.sides, memo))
        return other

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The keys as attention gets them."""
        return self.sides[0].dequantize()

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values as attention gets them."""
        return self.sides[1].dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(side.nbytes for side in self.sides)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize and store what is new; (keys, values) that it may look at, dequantized."""
        self.lazy_initialization(key_states, value_states)
        for side, x in zip(self.sides, (key_states, value_states), strict=True):
            side.append(x)
        shown = self.get_mask_sizes(key_states.shape[2])[0]
        self.length += key_states.shape[2]
        out = tuple(side.mark(whole if whole.shape[2] == shown else whole[:, :, -shown:])
                    for side in self.sides if (whole := side.dequantize()) is not None)
        if self.window is not None and not self.record_past:
            self._last(self.window - 1)
        if getattr(getattr(self.module, "config", None), "_attn_implementation", None) == NAME:
            self.module.__dict__[HANDED] = True
        return out  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys the next queries see, the position of the first)."""
        before = self.length if self.window is None else min(self.length, self.window - 1)
        return before + query_length, self.length - before

    def activate_past_recording(self) -> None:
        """Keep what has left the window until the next `crop`, which may go back there."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens.

        Raises:
            QuantError: a positive number; tokens that have left a window which did not record them.
        """
        n = -tokens_to_remove
        if n < 0:
            raise QuantError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        if self.window is not None and self.length >= self.window and not self.record_past:
            raise QuantError("tokens that have left the sliding window are gone; call activate_past_recording() before they do, then crop")
        if n:
            for side in self.sides:
                side.each(lambda t: t[:, :, :-n])
            self.length = max(self.length - n, 0)
        if self.window is not None:
            self._last(self.window - 1)

    def reset(self) -> None:
        """Forget all."""
        self.length, self.is_initialized = 0, False
        for side in self.sides:
            side.parts, side.fixed, side.seen = {}, None, None

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows as beam search has chosen them."""
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._rows(lambda t: t[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self.sides:
            side.each(change)

    def _move(self, device: Any) -> None:
        self._rows(lambda t: t.to(device))

    def _last(self, n: int) -> None:
        self._rows(lambda t: t[:, :, max(t.shape[2] - n, 0):])


class KeyValueCache(Cache):
    """The cache of a model: KeyValues where attention quantizes keys or values, transformers' own layers elsewhere."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        ours = sum(layer.nbytes for layer in self.layers if isinstance(layer, KeyValues))
        return ours + sum(t.nbytes for layer in self.layers for t in vars(layer).values() if isinstance(t, Tensor) and t.dim() > 2)
