"""Families of language models, unmodified from transformers: a scheme with a quantized cache, and two papers. What is saved and loaded computes the
same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_laws_of_models import IDS, task

from qatlas import papers
from qatlas.layers.cache import KeyValueCache, KeyValues
from qatlas.layers.quantized import Quantized
from qatlas.model.coverage import describe
from qatlas.model.pack import load_packed, save
from qatlas.model.roles import Role
from qatlas.model.rules import keep_full, quantize

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO, HEAD = {"num_key_value_heads": 2}, {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZE | TWO, "Qwen3": SIZE | TWO | HEAD, "Mistral": SIZE | TWO | {"sliding_window": 6}, "Gemma": SIZE | HEAD | {"num_key_value_heads": 1},
    "Gemma2": SIZE | TWO | HEAD | {"sliding_window": 6, "query_pre_attn_scalar": 8}, "Phi3": SIZE | TWO,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Mixtral": SIZE | TWO | {"num_local_experts": 4}, "Qwen3Moe": SIZE | TWO | HEAD | {"num_experts": 4, "num_experts_per_tok": 2,
                                                                                      "moe_intermediate_size": 16},
}


def built(family: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    return kind(getattr(transformers, f"{family}Config")(**FAMILIES[family])).eval()


def reloaded(model: Any, path: Path) -> Any:
    """The model from its directory, which computes the same."""
    with torch.no_grad():
        logits = model.eval()(IDS).logits
        again = load_packed(save(model, path))
        assert torch.equal(again(IDS).logits, logits)
    return again


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scheme_with_its_cache(family: str, tmp_path: Path) -> None:
    model = quantize(built(family), "w4a8kv8")
    cover = describe(model, {"input_ids": IDS}).check()
    assert {signal.calls for signal in cover.signals} == {(1, 1)} and len(cover.signals) == 4
    again = reloaded(model, tmp_path / "saved")
    how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "attention_mask": torch.ones_like(IDS)}
    ours, theirs, plain = model.generate(IDS, **how), again.generate(IDS, **how), model.generate(IDS, cache_implementation="dynamic", **how)
    assert isinstance(theirs.past_key_values, KeyValueCache) and all(isinstance(layer, KeyValues) for layer in theirs.past_key_values.layers)
    assert not isinstance(plain.past_key_values, KeyValueCache)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits)), "stored as codes or quantized in each step: the same bits"
    for logits in (torch.stack(theirs.logits, 1), model(ours.sequences).logits[:, IDS.shape[1] - 1: -1]):
        assert (torch.stack(ours.logits, 1) - logits).abs().max() < 1e-5 * logits.abs().max() + 1e-6, "but for the rounding of products"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lsq", "paretoq"])
def test_papers_train_it(name: str, family: str, tmp_path: Path) -> None:
    model = papers.paper(name)(built(family), task(extra_rules=keep_full(Role.ROUTER)), steps=2)
    assert all(p.isfinite().all() for p in model.parameters())
    assert len([layer for layer in model.modules() if isinstance(layer, Quantized)]) >= 8
    reloaded(model, tmp_path / "saved")
