"""The rows of GPT-2's one matrix for query, key and value have addresses; other fused matrices are refused by name."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from qatlas.core.error import QuantError, RuleError
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Ternary
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMean
from qatlas.core.scheme import scheme, weight
from qatlas.layers.rows import Rows
from qatlas.model.coverage import describe
from qatlas.model.pack import load_packed, pack, save
from qatlas.model.rules import Rule, keep_full, quantize

IDS = torch.arange(20).view(2, 10)
TWN = Quant(Ternary(0.7), PerTensor(), AbsMean(), refit=True)
PARTS = [Rule(f"*.c_attn[{part}]", weight=TWN) for part in "qkv"]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)).eval()


def test_the_first_rule_that_speaks_of_a_part_wins():
    model = quantize(gpt2(), [Rule("*.0.attn.c_attn[v]", weight=weight(8)), *keep_full("*.c_attn[k]"), Rule("*.attn.*", weight=weight(4)),
                              Rule("*.c_attn[q]", weight=weight(2)), Rule("*.c_attn", input=scheme("w4a8").input)])
    first, second = (block.attn.c_attn.slots for block in model.transformer.h)
    assert first.weight == Rows((weight(4), None, weight(8))) and second.weight == Rows((weight(4), None, weight(4))) and first.input is not None
    assert model.transformer.h[0].attn.c_proj.slots.weight == weight(4)
    rows = {row.name: row for row in describe(model, {"input_ids": IDS}).rows}
    assert rows["transformer.h.0.attn.c_attn"].weight == "Uniform 4b / full / Uniform 8b" and rows["transformer.h.0.attn.c_attn"].calls == (1, 1)
    hard = model.transformer.h[0].attn.c_attn.hard()
    assert torch.equal(hard[:, 32:64], model.transformer.h[0].attn.c_attn.weight[:, 32:64]), "the master lies (in, out)"
    with pytest.raises(QuantError, match=r"transformer.h.0.attn.c_attn: .*full precision"):
        pack(model)


def test_equal_parts_have_one_scale_each_and_are_saved_and_loaded_bit_for_bit(tmp_path):
    rules = [*PARTS, Rule("*.c_proj", weight=weight(4))]
    again = from_json(json.loads(json.dumps([rule.to_json() for rule in rules])))
    assert list(again) == rules
    model = quantize(gpt2(), again)
    assert model.transformer.h[0].attn.c_attn.slots.weight == Rows((TWN, TWN, TWN))
    whole = quantize(gpt2(), [Rule("*.c_attn", weight=TWN), *(rule.but(optional=True) for rule in PARTS), Rule("*.c_proj", weight=weight(4))])
    assert whole.transformer.h[0].attn.c_attn.slots.weight == TWN, "the whole was said first"
    for one, steps in ((model, 3), (whole, 1)):
        assert len(one.transformer.h[0].attn.c_attn.hard().abs().unique()) == steps + 1
    before = model(IDS).logits
    loaded = load_packed(save(model, tmp_path / "out"))
    assert torch.equal(loaded(IDS).logits, before) and torch.equal(pack(model)(IDS).logits, before)


def test_rows_that_have_no_address_are_refused():
    phi = Phi3ForCausalLM(Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, pad_token_id=0))
    with pytest.raises(RuleError, match=r"rule 1: .*qkv_proj\[q\].*matches no matrix whose rows have addresses.*none in this model"):
        quantize(phi, [Rule("*.qkv_proj[q]", weight=weight(4))])
    with pytest.raises(RuleError, match=r"c_atn\[q\].*with \[q\], \[k\] and \[v\]: transformer.h.0.attn.c_attn"):
        quantize(gpt2(), [Rule("*.c_atn[q]", weight=weight(4))])
    with pytest.raises(RuleError, match="have a weight of their own and nothing else"):
        Rule("*.c_attn[q]", input=scheme("w4a8").input)
