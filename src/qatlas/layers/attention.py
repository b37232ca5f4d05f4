"""Attention with numbers of its own: q k^T and probs v quantized, with a named tap at every step. One function, which transformers calls.

    query, key, value         (B, H, T, d), (B, G, S, d), (B, G, S, d): as the model gives them, after rotary positions, before keys are repeated
    scores         (B, H, T, S)   Q(query) Q(key)^T scaling, + position bias, softcap, + mask: what the softmax sees
    probabilities  (B, H, T, S)   softmax(scores), before dropout
    context        (B, H, T, d)   Q(dropout(probabilities)) Q(value), before the heads are merged

A tap stands before the quantizer (and the dropout) of its signal: what is put in its place is dropped out and quantized like the model's own
(Teacher Intervention, arXiv 2302.11812, section 3.2). A reader hears what the model computed, also where something else goes on.

`register` makes the function known to transformers' AttentionInterface as "qatlas"; a model is switched to it by its configuration, and back. No
model file is copied and nothing is patched. transformers' models do not all compute the same (attention sinks, biases of their own): at its first
call in a module the function is held against the model's own eager attention, on one row, and refuses a model whose attention is another one.

Quantizers are children of the attention module: `query_quantizer`, `key_quantizer`, `value_quantizer`, `probabilities_quantizer`. With one scale a
token they keep a decoder causal: keys and values are then quantized alike whether they come from the cache or not. What our own cache gives
(cache.py) was quantized where it was made, bears the mark of that, and passes untouched. Probabilities lie in [0, 1] and take an unsigned grid; an
open one (`Uniform(8, None)`) is closed to that. The symmetric grid of TernaryBERT's code wastes one bit and is taken only when it is asked for aloud,
by `Uniform(8, narrow=True)`. None rounds the scores, in which the mask stands; `scores_quantizer` may be one that looks on and lets them pass
(EdgeQAT chooses the bits of tokens by them).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.grain import PerChannel
from ..core.grid import Uniform
from ..core.quantizer import Quant, Quantizer, working

NAME = "qatlas"
QUANTIZED = ("query", "key", "value", "probabilities")            # signals that can have a Quantizer
WATCHED = ("scores",)                                             # those at which one may stand that looks on and lets pass
SLOTS = (*QUANTIZED, *WATCHED)
INSIDE = ("query", "key", "value", "scores", "probabilities", "context")
CALLS = "ALL_ATTENTION_FUNCTIONS"                                 # what a forward names when it goes through AttentionInterface
TAPS, AGREES = "qatlas_taps", "qatlas_agrees"
STORED, HANDED = "qatlas_stored", "qatlas_handed"                 # on a tensor: the Quant by which a cache holds it; on a module: just given
NEAR = {torch.float16: 1e-2, torch.bfloat16: 5e-2}                # how far from the model's own attention is still the same, relative; else 1e-4


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
              dropout: float = 0.0, softcap: float | None = None, position_bias: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:
    """The function that transformers calls: ((B, T, H, d), the map (B, H, T, S) after dropout).

    Raises:
        QuantError: a model whose own attention computes something else.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _received(module, key, value)
    mask = _additive(attention_mask, query.dtype)
    if AGREES not in module.__dict__ and not torch.compiler.is_compiling():
        _check(module, query, key, value, mask, {"scaling": scaling, "softcap": softcap, "position_bias": position_bias}, rest)
    q, k = (quantized(module, name, through(module, name, x)) for name, x in (("query", query), ("key", key)))
    scores = quantized(module, "scores", through(module, "scores", _scores(q, k, mask, scaling, softcap, position_bias)))
    v = quantized(module, "value", through(module, "value", value))  # after the scores: a token's bits may follow from them
    probs = through(module, "probabilities", working(scores).softmax(-1).to(v.dtype))
    probs = quantized(module, "probabilities", F.dropout(probs, dropout, module.training))
    context = through(module, "context", probs @ _repeat(v, probs))   # (B, H, T, d)
    return context.transpose(1, 2).contiguous(), probs


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, bias: Tensor | None) -> Tensor:
    scores = q @ _repeat(k, q).transpose(2, 3) * scaling
    scores = scores if bias is None else scores + bias
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return scores if mask is None else scores + mask


def _repeat(x: Tensor, like: Tensor) -> Tensor:
    """(B, G, S, d) -> (B, H, S, d): each key head serves H / G query heads."""
    times = like.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of booleans (True: seen) as one to be added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def through(module: nn.Module, signal: str, x: Tensor) -> Tensor:
    """The signal after all taps that stand at it; x itself where there is none."""
    for tap in module.__dict__.get(TAPS, {}).get(signal, ()):
        x = tap(x)
    return x


def quantized(module: nn.Module, signal: str, x: Tensor) -> Tensor:
    """The signal through its Quantizer; x itself where it has none, or where a cache has stored it by the same numbers.

    Raises:
        QuantError: stored by other numbers.
    """
    quantizer: Any = module._modules.get(f"{signal}_quantizer")
    stored = getattr(x, STORED, None)
    if stored is None:
        return x if quantizer is None else quantizer(x)
    if quantizer is None or not quantizer.on or quantizer.quant != stored:
        own = "leaves it in full precision" if quantizer is None or not quantizer.on else f"quantizes it by {quantizer.quant.grid}"
        raise QuantError(f"the {signal} comes from a cache that stores it as {stored.grid}, and this {type(module).__name__} {own}; make the cache "
                         "anew for the model as it is now, and give layers that share keys and values one rule")
    return x


def _received(module: nn.Module, key: Tensor, value: Tensor) -> None:
    """See that what the cache has just given arrived as it was."""
    if torch.compiler.is_compiling() or not module.__dict__.pop(HANDED, False):
        return
    for name, x in (("key", key), ("value", value)):
        if name in attached(module) and getattr(x, STORED, None) is None:
            raise QuantError(f"{type(module).__name__} computes on the {name} between cache and attention, so it would be quantized twice; generate "
                             'with a full-precision cache instead: model.generate(..., cache_implementation="dynamic")')


def recomputing() -> bool:
    """Whether this forward is a part of a backward: the second run of a checkpointed block."""
    return bool(torch._C._current_graph_task_id() != -1)           # as torch.utils.checkpoint and FSDP ask it


def fitted(signal: str, quant: Quant) -> Quant:
    """The Quant of a signal inside attention, closed to [0, 1] for probabilities.

    Raises:
        QuantError: a signal without a quantizer, a scale for each row of the batch, a signed grid for probabilities.

    >>> fitted("probabilities", Quant(Uniform(8, None), PerChannel(1))).grid.signed
    False
    """
    if signal not in QUANTIZED and not (signal in WATCHED and quant.watches):
        raise QuantError(f"{signal} has no quantizer; inside attention these have one: {', '.join(QUANTIZED)}")
    if isinstance(quant.grain, PerChannel) and quant.grain.axis == 0:
        raise QuantError(f"{signal}: one scale for each index of axis 0 is one for each sample of a batch; write PerToken(), PerTensor() or "
                         "PerChannel(1), one for each head")
    if signal == "probabilities" and isinstance(quant.grid, Uniform):
        if quant.grid.signed is None:
            return quant.but(grid=quant.grid.but(signed=False))
        if quant.grid.signed and not quant.grid.narrow:
            raise QuantError(f"probabilities lie in [0, 1], and the signed grid {quant.grid} wastes half of its values; write Uniform("
                             f"{quant.grid.bits}, False), or Uniform({quant.grid.bits}, narrow=True) for the symmetric grid of the literature")
    return quant


def attach(module: nn.Module, quants: dict[str, Quant]) -> None:
    """Give an attention module its quantizers: signal -> Quant."""
    for signal, quant in quants.items():
        setattr(module, f"{signal}_quantizer", fitted(signal, quant).build())


def attached(module: nn.Module) -> dict[str, Quantizer]:
    """Signal -> the Quantizer of an attention module."""
    if not attends(module):
        return {}
    return {name: q for name in SLOTS if isinstance(q := module._modules.get(f"{name}_quantizer"), Quantizer)}


def attends(module: nn.Module) -> bool:
    """Whether a module's forward goes through transformers' AttentionInterface."""
    return _goes(type(module).forward)


@lru_cache
def _goes(forward: Callable[..., Any]) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and CALLS in code.co_names


def remembers(module: nn.Module) -> bool:
    """Whether a module's forward stores keys and values in a cache, be it through AttentionInterface or not."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "update" in code.co_names and any("past" in name for name in code.co_varnames[: code.co_argcount])


def register() -> None:
    """Make `attention` known to transformers as "qatlas"; twice is once."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)


@torch.no_grad()
def _check(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: dict[str, Any], rest: dict[str, Any]) -> None:
    """Hold the plain attention against the model's own, on the first row of the batch."""
    own: Callable[..., Any] | None = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if own is None:
        raise QuantError(f"{type(module).__name__} has no eager attention of its own to compare with; signals inside its attention are not offered")
    q, k, v = query[:1], key[:1], value[:1]
    first = None if mask is None else mask[:1]
    given = {name: x for name, x in how.items() if x is not None}
    theirs = own(module, q, k, v, first, dropout=0.0, **given, **rest)[0]
    scores = _scores(q, k, first, how["scaling"], how["softcap"], None if how["position_bias"] is None else how["position_bias"][:1])
    ours = (working(scores).softmax(-1).to(v.dtype) @ _repeat(v, q)).transpose(1, 2)
    apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not apart <= NEAR.get(q.dtype, 1e-4):
        raise QuantError(f"{type(module).__name__} computes more than softmax(q k) v (its own attention differs by {apart:.1g}: sinks, or a bias of "
                         "its own); signals inside its attention are not offered, inputs and outputs of its modules are")
    module.__dict__[AGREES] = True
