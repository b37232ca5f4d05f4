"""Generation with a cache of codes: by itself, through pack, save and load, with beams, windows and drafts; the same numbers as with any other cache;
and what cannot be served is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import write_llama
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from qatlas.cli import main
from qatlas.core.error import QuantError, RuleError
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax
from qatlas.core.scheme import cache as quant
from qatlas.core.scheme import scheme, weight
from qatlas.layers import attention
from qatlas.layers.cache import KeyValueCache, KeyValues
from qatlas.model.pack import load_into, load_packed, pack, save
from qatlas.model.rules import Rule, cached, keep_full, quantize
from qatlas.model.serving import HOOK, cache, keep
from qatlas.model.taps import override

IDS = torch.arange(24).view(2, 12) * 7 % 60 + 3
MASK = torch.ones_like(IDS)
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HOW = {"attention_mask": MASK, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def llama(text: Any = "w4a8kv4", **more: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZE, **more})).eval()
    return model if text is None else quantize(model, text)


def windowed(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mistral":
        return quantize(MistralForCausalLM(MistralConfig(**SIZE, sliding_window=5)).eval(), "w4a8kv4z")
    return quantize(Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, sliding_window=5, query_pre_attn_scalar=8)).eval(), "w4a8kv4z")


def same(one: Any, other: Any, exactly: bool = True) -> bool:
    near = torch.equal if exactly else lambda a, b: bool((a - b).abs().max() < 1e-6)
    return torch.equal(one.sequences, other.sequences) and all(map(near, one.logits, other.logits))


@pytest.mark.parametrize("text", ["w4a8kv4", "w2kv2z", "w4a8kv3", "w1.58a8kv8"])
def test_generate_stores_codes_by_itself_also_packed_saved_and_loaded(text: str, tmp_path: Path) -> None:
    model = llama(text)
    first = model.generate(IDS, **HOW)
    found = first.past_key_values
    assert isinstance(found, KeyValueCache) and [type(layer) for layer in found.layers] == [KeyValues] * 2
    assert same(first, model.generate(IDS, cache_implementation="dynamic", **HOW)), "the same bits as with the cache in full precision"
    save(model, tmp_path / "saved")
    for other in (load_packed(tmp_path / "saved"), load_into(llama(None), tmp_path / "saved"), pack(copy.deepcopy(model))):
        again = other.generate(IDS, **HOW)
        assert same(first, again) and isinstance(again.past_key_values, KeyValueCache) and again.past_key_values.nbytes == found.nbytes


def test_memory_is_a_fraction() -> None:
    model = llama(hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=2)
    with torch.no_grad():
        ours, plain = (model(IDS, past_key_values=c).past_key_values for c in (cache(model), DynamicCache()))
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert ours.nbytes / full == 34 / 256, "32 bytes of codes and 2 of the scale, where fp32 has 256"


def test_only_growing_caches_that_nobody_asked_for_are_replaced() -> None:
    model = llama()
    ours = model.generate(IDS, **HOW)
    given = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(config=model.config, max_cache_len=24)}
    for name, one in given.items():
        answer = model.generate(IDS, past_key_values=one, **HOW)
        assert same(ours, answer, name == "dynamic") and answer.past_key_values is one and not any(isinstance(x, KeyValues) for x in one.layers)
    assert same(ours, model.generate(IDS, cache_implementation="static", **HOW), exactly=False)
    assert same(ours, model.generate(IDS, use_cache=False, **HOW), exactly=False)
    mine = cache(model)
    assert model.generate(IDS, past_key_values=mine, **HOW).past_key_values is mine and mine.nbytes == ours.past_key_values.nbytes
    with pytest.raises(QuantError, match="QuantizedCache of transformers would round them a second time"):
        model.generate(IDS, cache_implementation="quantized", cache_config={"backend": "fp8"}, **HOW)
    plain = llama("w4a8")
    assert HOOK not in plain.__dict__ and not isinstance(plain.generate(IDS, **HOW).past_key_values, KeyValueCache)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_sliding_windows(kind: str) -> None:
    model = windowed(kind)
    ours, plain = model.generate(IDS, **HOW), model.generate(IDS, cache_implementation="dynamic", **HOW)
    assert same(ours, plain) and ours.past_key_values.is_sliding == plain.past_key_values.is_sliding and any(plain.past_key_values.is_sliding)
    held, full = ours.past_key_values.layers, plain.past_key_values.layers
    assert [layer.sides[0].parts["codes"].shape[2] for layer in held] == [layer.keys.shape[2] for layer in full]
    with torch.no_grad():
        whole, kept = model(ours.sequences).logits, cache(model)
        parts = [model(part, past_key_values=kept).logits for part in ours.sequences.split([3, 1, 6, 1, 7], 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max() + 1e-6


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True},
                                 {"num_beams": 2, "do_sample": True}], ids=str)
def test_beams_and_samples(how: dict[str, Any]) -> None:
    model, answers = llama(), []
    for more in ({}, {"cache_implementation": "dynamic"}):
        torch.manual_seed(1)
        answers.append(model.generate(IDS, **{**HOW, **how, **more}))
    assert same(*answers) and isinstance(answers[0].past_key_values, KeyValueCache)


@pytest.mark.parametrize("make", [llama, lambda: windowed("mistral")], ids=["llama", "mistral"])
def test_drafts_are_rolled_back(make: Any) -> None:
    model, one = make(), {**HOW, "attention_mask": MASK[:1]}
    plain = model.generate(IDS[:1], **one)
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make()}):
        assert torch.equal(model.generate(IDS[:1], **one, **how).sequences, plain.sequences)


def test_padding_on_the_left() -> None:
    model, mask = llama(), MASK.clone()
    mask[0, :5] = 0
    how = {**HOW, "attention_mask": mask}
    assert same(model.generate(IDS, **how), model.generate(IDS, cache_implementation="dynamic", **how))


def test_a_prompt_is_computed_once_and_gone_on_from() -> None:
    model, kept = llama(), cache(llama())
    kept = cache(model)
    with torch.no_grad():
        model(IDS[:1, :8], past_key_values=kept)
    one = {**HOW, "attention_mask": MASK[:1]}
    for _ in range(2):
        assert same(model.generate(IDS[:1], past_key_values=copy.deepcopy(kept), **one), model.generate(IDS[:1], **one), exactly=False)
    assert kept.get_seq_length() == 8


def test_a_copy_of_the_model_serves_itself() -> None:
    model = llama()
    other = copy.deepcopy(model)
    assert other.__dict__[HOOK].__self__ is other
    assert same(model.generate(IDS, **HOW), other.generate(IDS, **HOW))
    for module in other.modules():                                # a self-teacher: quantizers off
        if hasattr(module, "on"):
            module.on = False
    assert not isinstance(other.generate(IDS, **HOW).past_key_values, KeyValueCache)
    with pytest.raises(QuantError, match="quantizes keys or values, so there is nothing to store"):
        cache(other)


def test_layers_and_sides_by_themselves_and_a_model_in_bf16() -> None:
    for rules in ([*keep_full("*.0.self_attn"), *cached(quant(4))], [Rule("@attention:value", signal=quant(3))],
                  cached(quant(8), quant(2, zero=True))):
        model = llama([*rules, Rule("*.mlp.*", weight=weight(4))])
        ours = model.generate(IDS, **HOW)
        assert same(ours, model.generate(IDS, cache_implementation="dynamic", **HOW)) and isinstance(ours.past_key_values, KeyValueCache)
    assert ours.past_key_values.layers[0].sides[1].quantizer.quant == quant(2, zero=True)
    half = llama().bfloat16()
    assert same(half.generate(IDS, **HOW), half.generate(IDS, cache_implementation="dynamic", **HOW))


def test_what_a_tap_puts_there_is_quantized_as_the_models_own() -> None:
    model, other = llama(), torch.randn(2, 2, 12, 8)
    with torch.no_grad(), override(model, {"model.layers.0.self_attn:value": other}):
        assert torch.equal(model(IDS, past_key_values=cache(model)).logits, model(IDS, use_cache=False).logits)


def test_what_cannot_be_served_is_refused_by_name() -> None:
    with pytest.raises(RuleError, match="the attention of BloomForCausalLM .*does not go through transformers' AttentionInterface"):
        quantize(BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)), "w4a8kv8")
    torch.manual_seed(0)
    two = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)),
                                    decoder=TrOCRForCausalLM(TrOCRConfig(vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=4,
                                                                         decoder_ffn_dim=48)))
    with pytest.raises(RuleError, match=r"self_attn: TrOCRAttention stores keys and values and does not go through.*keep_full\('decoder"):
        quantize(two, "w4kv8")
    for grain in (PerTensor(), PerChannel(1)):
        model = llama(cached(Quant(Uniform(8), grain, AbsMax())))
        with pytest.raises(QuantError, match=r"model.layers.0.self_attn:key cannot be stored in a cache: .*the next moves it.*Learned"):
            model.generate(IDS, **HOW)
        assert model.generate(IDS, cache_implementation="dynamic", **HOW).sequences.shape == (2, 18)
    with pytest.raises(QuantError, match="quantizes keys or values"):
        cache(llama("w4"))
    torch.manual_seed(0)
    bart = quantize(BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
                    decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    decoder_start_token_id=2, forced_eos_token_id=2)).eval(), cached(scheme("w4kv8").cache))
    with pytest.raises(QuantError, match=r"has cross-attention and keeps two caches.*EncoderDecoderCache\(DynamicCache\(\), DynamicCache\(\)\)"):
        bart.generate(IDS, **HOW)
    assert bart.generate(IDS, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), **HOW).sequences.shape[0] == 2
    twins = llama()
    twins.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(QuantError, match=r"model.layers.1.self_attn is layer 0 of the cache, which is that of model.layers.0.self_attn"):
        cache(twins)


def test_keys_changed_between_cache_and_attention_are_noticed() -> None:
    model = llama()
    with torch.no_grad():
        kept = cache(model)
        kept.layers[0].update = lambda k, v, *rest: tuple(x * 1 for x in KeyValues.update(kept.layers[0], k, v))  # type: ignore[method-assign]
        with pytest.raises(QuantError, match="LlamaAttention computes on the key between cache and attention"):
            model(IDS, past_key_values=kept)
        assert attention.HANDED not in model.model.layers[0].self_attn.__dict__ and model(IDS).logits.isfinite().all()


def test_the_command_generates_from_codes(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = write_llama(tmp_path / "model"), []
    save(quantize(LlamaForCausalLM.from_pretrained(folder), "w4a8kv4"), tmp_path / "out", tokenizer=folder)
    own = KeyValueCache.__init__
    monkeypatch.setattr(KeyValueCache, "__init__", lambda self, layers: (made.append(self), own(self, layers))[1])
    assert main(["generate", str(tmp_path / "out"), "--prompt", "the cat", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the cat") and len(made) == 1 and made[0].nbytes > 0


def test_values_beside_codes_are_a_choice_with_a_name() -> None:
    model = pack(llama())
    slow = model.generate(IDS, **HOW)
    keep(model, "values")
    fast = model.generate(IDS, **HOW)
    assert same(fast, slow) and fast.past_key_values.nbytes > slow.past_key_values.nbytes
    assert same(model.generate(IDS, past_key_values=cache(model, "codes"), **HOW), slow)
    with pytest.raises(QuantError, match="keeps codes or values"):
        keep(model, "nothing")
