"""A cache of codes: what it stores is what attention would have quantized, however the tokens come; rows, windows and cropping; what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qatlas.core.codebook import NF4
from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor, PerToken
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.core.scheme import cache
from qatlas.layers import attention
from qatlas.layers.cache import Codes, KeyValueCache, KeyValues, why_not

NESTED = Quant(Uniform(6, False), PerTensor(), AbsMax())
STATIC = Quant(Uniform(4), PerTensor(), Learned(AbsMax()), Clip())
QUANTS = {"symmetric": cache(4), "asymmetric": cache(4, zero=True), "3 bits": cache(3), "8 bits": cache(8), "2 bits with a zero": cache(2, zero=True),
          "offset": Quant(Uniform(4, False), PerToken(), MinMax(zero="offset", offset_dtype="float16")), "fp32 scales": Quant(Uniform(4), PerToken()),
          "groups": cache(4).but(grain=Group(4)), "floats": Quant(Float(2, 1), PerToken(), AbsMax()), "codebook": Quant(NF4, PerToken(), AbsMax()),
          "static": STATIC, "static heads": STATIC.but(grain=PerChannel(1)), "static features": STATIC.but(grain=PerChannel(-1))}


class Attending(nn.Module):
    """A module that goes through AttentionInterface."""

    def forward(self) -> Any:
        return ALL_ATTENTION_FUNCTIONS


def attending(key: Quant | None, value: Quant | None = None) -> Any:
    module = Attending()
    attention.attach(module, {name: quant for name, quant in (("key", key), ("value", value)) if quant is not None})
    for name, quantizer in attached(module).items():
        if not quantizer.ready:
            quantizer.initialise(drawn(40, seed=ord(name[0])))
    return module.eval()


def attached(module: Any) -> Any:
    return {name.removesuffix("_quantizer"): part for name, part in module.named_children()}


def drawn(tokens: int, seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, tokens, 8, generator=torch.Generator().manual_seed(seed))


def equal(one: KeyValues, other: KeyValues) -> bool:
    return all(a.parts.keys() == b.parts.keys() and all(torch.equal(t, b.parts[name]) for name, t in a.parts.items())
               for a, b in zip(one.sides, other.sides, strict=True))


@pytest.mark.parametrize("kind", QUANTS)
@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_however_tokens_come_the_codes_are_those_of_the_whole(kind: str, sizes: list[int], seed: int) -> None:
    module = attending(QUANTS[kind], cache(8))
    k, v = drawn(sum(sizes), seed), drawn(sum(sizes), seed + 1)
    whole, bit_by_bit = KeyValues(module), KeyValues(module)
    keys, values = whole.update(k, v)
    assert torch.equal(keys, module.key_quantizer(k)) and torch.equal(values, module.value_quantizer(v)), "bit for bit what training computes with"
    for part in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
        last = bit_by_bit.update(*part)
    assert equal(whole, bit_by_bit) and torch.equal(last[0], keys) and torch.equal(last[1], values)
    assert whole.get_seq_length() == sum(sizes) and torch.equal(whole.keys, keys) and torch.equal(whole.values, values)


def test_memory_is_what_codes_and_scales_take() -> None:
    x = torch.randn(1, 2, 100, 64)
    for quant, bytes_a_token in ((cache(4), 34), (cache(8), 66), (cache(2), 18), (cache(3), 26), (cache(4, zero=True), 35), (STATIC, 32),
                                 (cache(4).but(grain=Group(32)), 36)):
        layer = KeyValues(attending(quant, quant) if quant.scale.keeps == "nothing" else static(quant, x))
        layer.update(x, x)
        assert layer.nbytes == 2 * 2 * 100 * bytes_a_token
        assert KeyValueCache([layer]).nbytes == layer.nbytes
    plain = DynamicLayer()
    plain.update(x.bfloat16(), x.bfloat16())
    assert KeyValueCache([plain]).nbytes == 2 * 2 * 100 * 128


def static(quant: Quant, x: Tensor) -> nn.Module:
    module = Attending()
    attention.attach(module, {"key": quant, "value": quant})
    for part in module.children():
        part.initialise(x)
    return module


def test_one_side_alone_and_none() -> None:
    k, v = drawn(5), drawn(5, 1)
    layer = KeyValues(attending(None, cache(4)))
    keys, values = layer.update(k, v)
    assert torch.equal(keys, k) and not torch.equal(values, v) and layer.sides[0].parts.keys() == {"full"}
    assert getattr(keys, attention.STORED, None) is None and getattr(values, attention.STORED) == cache(4)
    assert layer.nbytes == k.nbytes + 2 * 3 * 5 * (4 + 2)


def test_a_model_in_bf16_gets_bf16_back() -> None:
    module, k = attending(cache(4), cache(4)), drawn(5).bfloat16()
    keys, _ = KeyValues(module).update(k, k)
    assert keys.dtype == torch.bfloat16 and torch.equal(keys, module.key_quantizer(k))


def test_rows_are_chosen_repeated_and_reordered_as_codes() -> None:
    module, k, v = attending(cache(4), QUANTS["groups"]), drawn(5, rows=3), drawn(5, 1, rows=3)
    beams = torch.tensor([2, 0, 0])
    for act, same in ((lambda c: c.reorder_cache(beams), lambda t: t[beams]),
                      (lambda c: c.batch_repeat_interleave(2), lambda t: t.repeat_interleave(2, 0)),
                      (lambda c: c.batch_select_indices(torch.tensor([1])), lambda t: t[1:2]), (lambda c: c.crop(-2), lambda t: t[:, :, :-2]),
                      (lambda c: c.crop(0), lambda t: t), (lambda c: (c.offload(), c.prefetch()), lambda t: t)):
        layer, fresh = KeyValues(module), KeyValues(module)
        layer.update(k, v)
        act(layer)
        fresh.update(same(k), same(v))
        more = same(drawn(1, 2, rows=3)) if same(k).shape[2] == 5 else drawn(1, 2, rows=3)
        assert all(map(torch.equal, layer.update(more, more), fresh.update(more, more))) and equal(layer, fresh)
        assert layer.get_seq_length() == fresh.get_seq_length()


@pytest.mark.parametrize("sizes", [[3, 1, 1, 1, 1, 1], [8, 1, 1], [1, 1, 4, 2], [2, 2, 2, 2], [4, 5]])
def test_a_window_keeps_what_transformers_own_layer_keeps(sizes: list[int]) -> None:
    module, k, v = attending(cache(4), cache(4, zero=True)), drawn(sum(sizes)), drawn(sum(sizes), 1)
    layer, own = KeyValues(module, window=4), DynamicSlidingWindowLayer(sliding_window=4)
    for part_k, part_v in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
        assert layer.get_mask_sizes(part_k.shape[2]) == own.get_mask_sizes(part_k.shape[2])
        got, full = layer.update(part_k, part_v), own.update(part_k, part_v)
        assert torch.equal(got[0], module.key_quantizer(full[0])) and torch.equal(got[1], module.value_quantizer(full[1]))
        assert layer.get_seq_length() == own.get_seq_length() and layer.is_sliding and layer.get_max_length() == own.get_max_length()
    assert layer.sides[0].parts["codes"].shape[2] == min(3, sum(sizes))


def test_a_window_that_records_can_be_cropped() -> None:
    module, k = attending(cache(4), cache(4)), drawn(10)
    layer, own = KeyValues(module, window=4), DynamicSlidingWindowLayer(sliding_window=4)
    for one in (layer, own):
        one.activate_past_recording()
        one.update(k[:, :, :7], k[:, :, :7])
    for one in (layer, own):
        one.crop(-2)
    got, full = layer.update(k[:, :, 7:], k[:, :, 7:]), own.update(k[:, :, 7:], k[:, :, 7:])
    assert torch.equal(got[0], module.key_quantizer(full[0])) and layer.get_seq_length() == own.get_seq_length() == 8
    late = KeyValues(module, window=4)
    late.update(k, k)
    with pytest.raises(QuantError, match="have left the sliding window.*activate_past_recording"):
        late.crop(-1)
    with pytest.raises(QuantError, match=r"crop\(2\): give minus the number"):
        late.crop(2)


def test_a_copy_is_of_its_own_and_belongs_to_the_same_model_and_reset_forgets() -> None:
    module, k = attending(cache(4), cache(4)), drawn(5)
    first = KeyValueCache([KeyValues(module)])
    first.update(k, k, 0)
    other = copy.deepcopy(first)
    other.update(k, k, 0)
    assert (first.get_seq_length(), other.get_seq_length()) == (5, 10) and other.layers[0].module is module
    assert other.layers[0].sides[0].quantizer is module.key_quantizer
    other.reset()
    assert other.get_seq_length() == 0 and other.nbytes == 0 and other.layers[0].keys is None
    assert torch.equal(other.update(k, k, 0)[0], module.key_quantizer(k))


def test_attention_lets_pass_what_is_stored_and_nothing_else() -> None:
    module, k = attending(cache(2), cache(2)), drawn(5)
    keys, _ = KeyValues(module).update(k, k)
    assert attention.quantized(module, "key", keys) is keys
    assert torch.equal(attention.quantized(module, "key", keys.clone()), module.key_quantizer(keys)), "without the mark a tensor like any other"
    other = attending(cache(4))
    with pytest.raises(QuantError, match=r"comes from a cache that stores it as Uniform\(bits=2.*quantizes it by Uniform\(bits=4.*the cache anew"):
        attention.quantized(other, "key", keys)
    with pytest.raises(QuantError, match="leaves it in full precision"):
        attention.quantized(nn.Module(), "key", keys)
    module.__dict__[attention.HANDED] = True
    with pytest.raises(QuantError, match="computes on the key between cache and attention.*quantized twice.*cache_implementation=\"dynamic\""):
        attention.attention(module, k, keys * 1, keys, None)
    assert attention.HANDED not in module.__dict__


@pytest.mark.parametrize(("quant", "says"), [
    (Quant(Uniform(4), PerTensor(), AbsMax()), "one scale for many tokens, measured afresh"), (Quant(Uniform(4), PerChannel(1)), "the next moves it"),
    (Quant(Uniform(4), Block(2, 4)), "measured afresh"), (STATIC.but(grain=PerChannel(2)), "another scale for each token"),
    (STATIC.but(grain=Group(4)), "another scale for each token"), (Quant(Uniform(4), PerToken(), AbsMax(nested=NESTED)), "quantized themselves")])
def test_what_cannot_be_stored_says_why(quant: Quant, says: str) -> None:
    assert says in (why_not(quant) or "")
    assert all(why_not(good) is None for good in QUANTS.values())


def test_what_is_refused_while_it_runs() -> None:
    module, k = attending(cache(4), cache(4)), drawn(5)
    with pytest.raises(QuantError, match="passes no gradient on.*use_cache=False"):
        KeyValues(module).update(k.requires_grad_(), k)
    k = k.detach()
    layer = KeyValues(module)
    layer.update(k, k)
    module.key_quantizer.on = False
    with pytest.raises(QuantError, match=r"switched off or being calibrated.*past_key_values=DynamicCache\(\)"):
        layer.update(k, k)
    assert KeyValues(module).sides[0].quantizer is None, "a cache made while it is off stores full precision"
    moved = attending(STATIC, STATIC)
    layer = KeyValues(moved)
    layer.update(k, k)
    with torch.no_grad():
        moved.key_quantizer.scale.mul_(2)
    with pytest.raises(QuantError, match="was changed between two tokens.*make the cache anew"):
        layer.update(k, k)
    wide = attending(cache(4).but(grain=Group(16)))
    with pytest.raises(QuantError, match="runs over several heads or tokens: 8 features"):
        KeyValues(wide).update(k[:, :2], k[:, :2])


def test_codes_alone() -> None:
    empty = Codes(None)
    assert empty.dequantize() is None and empty.nbytes == 0


@pytest.mark.parametrize("name", sorted(QUANTS))
@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_kept_values_are_the_same_bits_and_dequantize_new_tokens_only(name: str, window: int | None, monkeypatch: Any) -> None:
    module = attending(QUANTS[name])
    codes, values = KeyValues(module, window), KeyValues(module, window, "values")
    widths: list[int] = []
    own = Codes._values
    monkeypatch.setattr(Codes, "_values", lambda self, parts: (widths.append(parts["codes"].shape[2] if self.keep == "values" else 0),
                                                               own(self, parts))[1])
    for seed, tokens in enumerate((4, 1, 3, 1)):
        x, y = drawn(tokens, seed), drawn(tokens, seed + 9)
        for ours, theirs in zip(values.update(x, y), codes.update(x, y), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert [width for width in widths if width] == [4, 1, 3, 1] and values.nbytes > codes.nbytes
    twin = copy.deepcopy(values)
    for layer in (codes, values):
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([3, 0, 1]))
        if window is None:
            layer.crop(-2)
    assert torch.equal(values.keys, codes.keys) and twin.keys.shape[0] == 2       # type: ignore[union-attr, arg-type]
    values.reset()
    assert values.keys is None and values.nbytes == 0


def test_a_cache_keeps_one_of_two_things() -> None:
    with pytest.raises(QuantError, match="keeps codes or values"):
        KeyValues(attending(cache(4)), None, "floats")
