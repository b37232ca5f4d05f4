"""Generation with the cache that the rules ask for.

A model whose rules quantize keys or values (`"w4a8kv4"`, `Rule("@attention:key", signal=...)`) stores codes when it generates, by `model.generate` as
ever and by `qatlas generate`, also after pack, save and load. What the caller asks for goes before:

    model.generate(ids)                                        codes: `cache(model)` is made where transformers would make its growing cache
    model.generate(ids, past_key_values=cache(model))          the same, and the caller keeps it (`.nbytes`; a prompt's cache to copy and go on from)
    model.generate(ids, past_key_values=cache(model, "values"))      with dequantized values beside the codes: faster, and the memory of a full cache
    model.generate(ids, cache_implementation="dynamic")        transformers' growing cache in full precision: the same numbers, quantized in each step
    model.generate(ids, cache_implementation="static")         the same, of a fixed size; so past_key_values=DynamicCache(), StaticCache(...)
    model.generate(ids, cache_implementation="quantized")      refused: another library's numbers under ours

Quantizers that choose by more than the token itself (EdgeQAT's two widths) give no codes that could be stored: those models keep transformers' cache.

transformers has no place where a model names its cache, so a generating model gets `_prepare_cache_for_generation` as an attribute of its own, around
that of its class; classes stay as they are. A forward that is called by hand takes the cache that it is given, and else makes transformers' own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from ..core.error import QuantError
from ..layers.attention import attached
from ..layers.cache import KEEPS, SIDES, KeyValueCache, KeyValues, why_not

HOOK, KEEP = "_prepare_cache_for_generation", "qatlas_cache"


def keep(model: nn.Module, what: str) -> None:
    """What the caches keep that a model makes for itself from now on: codes, or values beside them (layers/cache.py).

    Raises:
        QuantError: neither of the two.
    """
    if what not in KEEPS:
        raise QuantError(f"keep(model, {what!r}): a cache keeps {' or '.join(KEEPS)}")
    for part in model.modules():
        if hasattr(type(part), HOOK):
            part.__dict__[KEEP] = what


def cache(model: Any, keep: str | None = None) -> KeyValueCache:
    """An empty cache for a model whose attention quantizes keys or values. keep: codes, or values beside them; None as `keep` has said, else codes.

    Raises:
        QuantError: a model without such quantizers, an encoder-decoder, numbers that no cache can store, a layer whose state is more than keys and
        values.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    held, how = _storing(model), keep or model.__dict__.get(KEEP, "codes")
    odd = next((f"{name}:{side}" for name, module in model.named_modules() for side, q in attached(module).items()
                if side in SIDES and not q.quant.plain), None)
    if odd is not None:
        raise QuantError(f"{odd} chooses its numbers by more than the token itself, so no codes of it can be stored; generate as ever, with "
                         "transformers' cache: the same numbers")
    if not held:
        raise QuantError(f"no attention of this {type(model).__name__} quantizes keys or values, so there is nothing to store as codes; write a "
                         'scheme with kv ("w4a8kv8"), or Rule("@attention:key", signal=...), or take transformers\' DynamicCache()')
    if getattr(model.config, "is_encoder_decoder", False) or getattr(model.config, "add_cross_attention", False):
        raise QuantError(f"{type(model).__name__} has cross-attention and keeps two caches, which are not stored as codes here; generate with "
                         "past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()): the same numbers in full precision")
    layers: list[Any] = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    taken: dict[int, str] = {}
    for name, module in held.items():
        at: Any = module.layer_idx
        for side in SIDES:
            if (quantizer := attached(module).get(side)) is not None and (reason := why_not(quantizer.quant)):
                raise QuantError(f"{name}:{side} cannot be stored in a cache: {reason}")
        if at in taken or at >= len(layers):
            raise QuantError(f"{name} is layer {at} of the cache, which {taken.get(at, f'has {len(layers)} layers')}; such a model is not served "
                             'from codes, generate with cache_implementation="dynamic"')
        if type(layers[at]) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise QuantError(f"{name}: its cache is a {type(layers[at]).__name__}, which holds more than keys and values; keep its key and value in "
                             'full precision, or generate with cache_implementation="dynamic"')
        layers[at], taken[at] = KeyValues(module, getattr(layers[at], "sliding_window", None), how), f"is that of {name}"
    return KeyValueCache(layers)


def serve(model: nn.Module) -> None:
    """Let every generating model inside of `model` store codes, where its attention quantizes keys or values."""
    for part in model.modules():
        if hasattr(type(part), HOOK) and HOOK not in part.__dict__ and any(_quantizes(module) for module in part.modules()):
            part.__dict__[HOOK] = MethodType(_prepare_cache_for_generation, part)


def _quantizes(module: nn.Module) -> bool:
    """Whether it is an attention with a quantizer of keys or values, and has a layer in a cache; what is not plain chooses anew in each forward."""
    sides = [q for side, q in attached(module).items() if side in SIDES]
    return hasattr(module, "layer_idx") and bool(sides) and all(q.quant.plain for q in sides)


def _storing(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> attention module whose keys or values are quantized now."""
    found = {name: module for name, module in model.named_modules() if _quantizes(module)}
    return {name: module for name, module in found.items() if any(q.on for side, q in attached(module).items() if side in SIDES)}


def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any) -> Any:
    """transformers' own, and then codes in the place of the growing cache that it made unasked."""
    from transformers.cache_utils import QuantizedCache

    given = model_kwargs.get("past_key_values")
    answer = getattr(type(self), HOOK)(self, generation_config, model_kwargs, *rest, **more)
    made = model_kwargs.get("past_key_values")
    if isinstance(made, QuantizedCache) and _storing(self):
        raise QuantError("this model's attention quantizes keys and values by its own rules, and a QuantizedCache of transformers would round them a "
                         "second time; leave cache_implementation out: codes are stored by themselves")
    if given is None and made is not None and generation_config.cache_implementation is None and _storing(self):
        made = model_kwargs["past_key_values"] = cache(self)
        if generation_config.is_assistant:
            made.activate_past_recording()
    return answer
