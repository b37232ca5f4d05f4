"""Rules reach what they name and nothing else, and say so when they cannot."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from qatlas.core.error import FormatError, QuantError, RuleError
from qatlas.core.grain import Group
from qatlas.core.noun import from_json
from qatlas.core.scheme import scheme, weight
from qatlas.core.transform import Chain, Hadamard, Permute, Smooth
from qatlas.export.gguf import plan, why_not
from qatlas.layers.adapter import Lora
from qatlas.layers.linear import QLinear, QTransposed
from qatlas.model.coverage import describe
from qatlas.model.pack import checkpoint
from qatlas.model.quantized import quantized, untie
from qatlas.model.roles import Role, roles
from qatlas.model.rules import Rule, keep_full, quantize

A8 = scheme("w4a8").input


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        vocab_size=128, **more)).eval()


def tiny(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return llama(), {"input_ids": torch.arange(12).view(2, 6)}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32)), {"input_ids": torch.arange(12).view(2, 6)}
    if kind == "bert":
        config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=128)
        return BertForSequenceClassification(config), {"input_ids": torch.arange(12).view(2, 6)}
    if kind == "vit":
        config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16, patch_size=4)
        return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_a_scheme_reaches_every_layer_of_an_unmodified_model(kind):
    model, batch = tiny(kind)
    quantize(model, "w4a8")
    cover = describe(model, batch).check()
    assert all(row.calls == (1, 1) for row in cover.rows if row.weight != "full")
    kept = {row.role for row in cover.rows if row.weight == "full"}
    assert all(any(word in role for word in ("embedding", "head", "classifier")) for role in kept)
    assert len(quantized(model)) > 3
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(("kind", "role", "name"), [
    ("llama", Role.HEAD, "lm_head"), ("bert", Role.ATTENTION, "bert.encoder.layer.0.attention.self"),
    ("gpt2", Role.ATTENTION, "transformer.h.1.attn"),
    ("llama", Role.EMBEDDING, "model.embed_tokens"), ("gpt2", Role.EMBEDDING, "transformer.wpe"),
    ("bert", Role.CLASSIFIER, "classifier"), ("vit", Role.CLASSIFIER, "classifier"), ("resnet", Role.CLASSIFIER, "classifier.1"),
    ("vit", Role.EMBEDDING, "vit.embeddings.patch_embeddings.projection")])
def test_roles_are_known_of_any_model(kind, role, name):
    assert role in roles(tiny(kind)[0])[name]


def test_the_first_rule_wins_slot_by_slot():
    model = llama()
    quantize(model, [Rule("*.q_proj", weight=weight(8)), Rule("*.q_proj", input=A8), Rule("*.layers.*.mlp.*", weight=weight(2)),
                     Rule("*proj", weight=weight(4))])
    layer = model.model.layers[0]
    assert (layer.self_attn.q_proj.slots.weight.bits, layer.self_attn.q_proj.slots.input, layer.self_attn.k_proj.slots.weight.bits) == (8, A8, 4)
    assert layer.mlp.up_proj.slots.weight.bits == 2 and layer.self_attn.k_proj.slots.input is None


def test_an_unused_rule_is_an_error_with_the_nearest_names():
    with pytest.raises(RuleError, match=r"rule 2 .*dwn_proj.* matches no layer[\s\S]*down_proj"):
        quantize(llama(), [Rule("*", weight=weight(4)), Rule("model.layers.*.mlp.dwn_proj", weight=weight(8))])
    with pytest.raises(RuleError, match="matches no module"):
        quantize(llama(), [*keep_full("*.experts"), Rule("*proj", weight=weight(4))])
    assert quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), [*keep_full(Role.HEAD), Rule("*", weight=weight(4))])


def test_a_signal_has_an_address():
    model = quantize(llama(), [Rule("*.k_proj:output", signal=A8), Rule("*proj", weight=weight(4))])
    assert model.model.layers[1].self_attn.k_proj.output_quantizer.quant == A8
    assert model.model.layers[1].self_attn.q_proj.output_quantizer is None
    with pytest.raises(RuleError, match="no signal values"):
        quantize(llama(), [Rule("*.k_proj:values", signal=A8)])
    with pytest.raises(RuleError, match="a signal has an address"):
        Rule("*.k_proj", signal=A8)


def test_tied_weights_share_one_quantizer_or_are_refused():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(RuleError, match=r"share one weight.*untie"):
        quantize(model, [Rule("lm_head", weight=weight(8)), Rule("*proj", weight=weight(4))])
    tied = llama(tie_word_embeddings=True)
    both = quantize(tied, [Rule(Role.HEAD, weight=weight(8)), Rule(Role.EMBEDDING, weight=weight(8)), Rule("*proj", weight=weight(4))])
    assert both.lm_head.weight is both.model.embed_tokens.weight
    assert both.lm_head.weight_quantizer is both.model.embed_tokens.weight_quantizer
    apart = untie(llama(tie_word_embeddings=True))
    assert quantize(apart, [Rule("lm_head", weight=weight(8))]).lm_head.weight is not apart.model.embed_tokens.weight


def test_wrong_numbers_name_the_layer():
    with pytest.raises(QuantError, match=r"model.layers.0.mlp.down_proj: a group of 64 does not divide the 96 inputs.*sizes that do: 16, 32"):
        quantize(llama(), "w4-g64")
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantError, match=r"q_proj.*NaN"):
        quantize(model, "w4")
    with pytest.raises(RuleError, match="quantized already"):
        quantize(quantize(llama(), "w4"), "w4")


def test_rules_go_to_json_and_back_and_give_the_same_logits():
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*.mlp.*", weight=weight(1.58), input=A8, transform=Hadamard(block=32, seed=3)),
             Rule("*.q_proj", weight=weight(4), adapter=Lora(4), keep="buffer"), Rule("*proj", weight=weight(3))]
    again = from_json(json.loads(json.dumps([rule.to_json() for rule in rules])))
    assert list(again) == rules
    one, two = llama(), llama()
    torch.manual_seed(1)
    quantize(one, rules)
    torch.manual_seed(1)
    quantize(two, again)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(one(ids).logits, two(ids).logits)


class Calibration:
    target, extra_rules = None, ()

    def __init__(self, *batches):
        self.batches = batches

    def calibration(self):
        return self.batches


@pytest.mark.parametrize("transform", [Hadamard(32), Smooth(), Permute(), Chain((Smooth(), Hadamard(32, seed=1)))])
def test_transforms_need_data_where_they_measure_and_leave_a_full_model_as_it_was(transform):
    model, ids = llama(), torch.arange(12).view(2, 6)
    before = model(ids).logits
    quantize(model, [Rule("*proj", transform=transform)], Calibration({"input_ids": ids}))
    assert (model(ids).logits - before).abs().max() < 1e-5
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.hard() - layer.weight).abs().max() < 1e-6
    if transform.needs_peak:
        with pytest.raises(QuantError, match="needs calibration data"):
            quantize(llama(), [Rule("*proj", transform=transform)])


def test_fused_paths_and_unreachable_matrices_are_seen():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1)
    quantize(encoder, [Rule("*", weight=weight(8))])
    with pytest.raises(RuleError, match="never ran|reached by no rule"):
        describe(encoder, torch.randn(2, 5, 64)).check()

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.out = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.out(x @ self.up[0])

    model = quantize(Experts(), [Rule("out", weight=weight(4))])
    with pytest.raises(RuleError, match=r"reached by no rule.*up"):
        describe(model, torch.randn(2, 8)).check()
    describe(quantize(Experts(), [*keep_full("up"), Rule("out", weight=weight(4))]), torch.randn(2, 8)).check()


def test_layers_share_parameters_and_hooks_with_what_they_replace():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    parameter, called = model[0].weight, []
    model[0].register_forward_hook(lambda *_: called.append(1))
    quantize(model, [Rule("0", weight=weight(4))])
    model(torch.randn(1, 8))
    assert isinstance(model[0], QLinear) and model[0].weight is parameter and called == [1]
    assert QTransposed in {type(m) for m in quantize(tiny("gpt2")[0], "w4").modules()}


def test_keeping_a_block_full_keeps_all_that_is_in_it():
    model = quantize(llama(), [*keep_full("model.layers.0", Role.EMBEDDING, Role.HEAD), Rule("*", weight=scheme("w4").weight)])
    assert {name.split(".")[2] for name in quantized(model)} == {"1"}
    describe(model).check()


@pytest.mark.parametrize("where", ["*.self_attn:probs", "*.mlp:output"])
def test_an_address_that_meets_no_layer_is_an_error(where):
    with pytest.raises(RuleError, match="there is no signal probs|has no quantizer"):
        quantize(llama(), [Rule(where, signal=A8), Rule("*_proj", weight=weight(4))])


def test_an_address_takes_a_signal_and_nothing_else():
    with pytest.raises(RuleError, match="weight=.*takes signal="):
        Rule("*.q_proj:output", weight=weight(4))
    with pytest.raises(RuleError, match="takes signal="):
        Rule("*.q_proj:output")


def test_a_model_that_is_one_layer_cannot_be_replaced():
    with pytest.raises(RuleError, match="itself one Linear"):
        quantize(nn.Linear(8, 8), [Rule("*", weight=weight(4))])


def test_layers_with_a_forward_or_a_weight_of_their_own_are_not_reached():
    """Accelerate's hooks put a forward on the instance, which would go on calling the old layer; weight_norm computes its weight."""
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    model[0].forward = model[0].forward
    quantize(model, [Rule("*", weight=weight(4))])
    assert list(quantized(model)) == ["2"]
    assert describe(model).unreached == ["0.weight", "1.parametrizations.weight.original1"]


def test_tied_weights_share_a_quantizer_only_where_it_sees_one_tensor():
    """A scale that was measured on the plain table does not serve the rotated one."""
    with pytest.raises(RuleError, match="share one weight"):
        quantize(llama(tie_word_embeddings=True), [Rule("lm_head", transform=Hadamard(seed=1)), Rule("*", weight=weight(4))])


def test_a_target_names_the_type_of_the_body_and_embeddings_take_what_holds_them():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                                         num_key_value_heads=2))
    rules = [Rule("@embedding", weight=weight(8, Group(32))), Rule("@head", weight=weight(4, Group(32))), Rule("*", weight=weight(1.58))]
    quantize(model, rules, SimpleNamespace(extra_rules=(), target="gguf:tq2_0", probe=dict))
    held = {"tq2_0": ["model.layers.0.mlp.up_proj"], "q8_0": ["model.embed_tokens"], "q4_0": ["lm_head"]}
    for kind, names in held.items():
        for name in names:
            assert why_not(model.get_submodule(name).weight_quantizer.quant, kind, (64, 256)) is None
    said = plan(checkpoint(model), "tq2_0")
    assert (said["token_embd.weight"], said["output.weight"], said["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0", "TQ2_0")
    with pytest.raises(FormatError, match=r"(?s)model\.layers\.0\..*q8_0"):
        quantize(LlamaForCausalLM(model.config), [Rule("*", weight=weight(8))], SimpleNamespace(extra_rules=(), target="gguf:tq2_0", probe=dict))
