"""Signals are read, replaced and cut off where the address says, and nowhere else."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomModel,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    Phi3Config,
    Phi3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from qatlas.core.error import QuantError, RuleError
from qatlas.layers.attention import TAPS
from qatlas.model import signals
from qatlas.model.taps import override, read, stop_gradient

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(20).view(2, 10) * 7 % 60 + 1
INSIDE = ("query", "key", "value", "scores", "probabilities", "context")


def built(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZE, vocab_size=64)).eval(), {"input_ids": IDS}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).eval(), {"input_ids": IDS}
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=4)).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    return LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=64, num_key_value_heads=2)).eval(), {"input_ids": IDS}


def clean(model):
    """Nothing of ours is left on the model."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) if h.__module__.startswith("qatlas")]
    return not hooks and signals.HELD not in model.__dict__ and not any(TAPS in m.__dict__ for m in model.modules())


KINDS = ["bert", "llama", "gpt2", "vit"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_model_computes(kind):
    own, batch = built(kind)
    own.set_attn_implementation("eager")
    whole = own(**batch, output_attentions=True, output_hidden_states=True)
    model, _ = built(kind)
    with read(model, [*(f"@attention:{s}" for s in INSIDE), "@attention:projected", "*.0:output", "*.0:input", "*.1:input"]) as found:
        logits = model(**batch).logits
    around = list(signals.attentions(model))
    assert (logits - whole.logits).abs().max() < 1e-5 and model.config._attn_implementation == "sdpa" and clean(model)
    for name, theirs in zip(around, whole.attentions, strict=True):
        assert torch.allclose(found[f"{name}:probabilities"], theirs, atol=1e-6)
        assert torch.allclose(found[f"{name}:scores"].softmax(-1), theirs, atol=1e-6)
    block = next(name for name in found if name.endswith(".0:output"))
    assert torch.allclose(found[block], whole.hidden_states[1], atol=1e-5)
    assert torch.allclose(found[block.replace("output", "input")], whole.hidden_states[0], atol=1e-6)
    assert found[f"{around[0]}:projected"].shape == whole.hidden_states[0].shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", [*INSIDE, "projected", "output", "input"])
def test_a_teachers_signals_put_into_an_equal_student_change_nothing(kind, signal):
    teacher, batch = built(kind)
    with torch.no_grad(), read(teacher, f"@attention:{signal}") as found:
        expected = teacher(**batch).logits
    assert not any(x.requires_grad for x in found.values())
    same = built(kind)[0]
    with override(same, found):
        assert (same(**batch).logits - expected).abs().max() < 1e-5
    assert clean(same)


def test_a_context_without_a_forward_says_so():
    model, batch = built("llama")
    with pytest.raises(QuantError, match=r"nothing passed there while it was open \(model.layers.0.self_attn was not called\)"), \
            read(model, "*.self_attn:scores"):
        pass
    assert clean(model)
    with pytest.raises(ZeroDivisionError), read(model, "*.self_attn:scores"):
        model(**batch)
        _ = 1 / 0
    assert clean(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("signal", "dead"), [("scores", "qk"), ("probabilities", "qk"), ("context", "qkv"), ("projected", "qkvo"), ("query", "q"),
                                              ("value", "v")])
def test_an_override_takes_the_place_of_all_that_stands_before_it(signal, dead):
    teacher, batch = built("llama", seed=1)
    student, _ = built("llama")
    with torch.no_grad(), read(teacher, f"*.self_attn:{signal}") as found:
        teacher(**batch)
    with override(student, found), read(student, f"*.self_attn:{signal}") as own:
        logits = student(**batch).logits
        logits.square().sum().backward()
    assert all(not torch.equal(own[a], found[a]) and own[a].requires_grad for a in found), "the reader hears the student"
    for name, p in student.named_parameters():
        if "self_attn" in name:
            cut = name.split(".")[-2][0] in dead
            assert (p.grad is None) == cut, name
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "self_attn" in name and name.split(".")[-2][0] in dead:
                p.add_(1.0)
    with override(student, found):
        assert torch.equal(student(**batch).logits, logits)


def test_gradients_flow_through_overriding_functions_and_into_overriding_tensors():
    model, batch = built("gpt2")
    model.double()
    with read(model, "*.0.attn:probabilities") as found:
        plain = model(**batch).logits
    shift = torch.zeros_like(found["transformer.h.0.attn:probabilities"], requires_grad=True)
    with override(model, {"*.0.attn:probabilities": lambda x: x + shift}):
        logits = model(**batch).logits
        assert torch.equal(logits, plain)
        slope = torch.autograd.grad(logits.square().sum(), shift)[0]
        index, step = (1, 2, 7, 3), 1e-5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                shift[index] = sign * step
                ends.append(model(**batch).logits.square().sum())
    assert torch.isclose((ends[0] - ends[1]) / (2 * step), slope[index], rtol=1e-5)
    given = found["transformer.h.0.attn:probabilities"].detach().requires_grad_()
    with override(model, {"*.0.attn:probabilities": given}):
        assert torch.allclose(torch.autograd.grad(model(**batch).logits.square().sum(), given)[0], slope, atol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
@pytest.mark.parametrize("cut", [("query",), ("key", "value"), ("query", "key", "value")])
def test_gradients_stop_at_the_inputs_of_q_k_and_v_by_themselves(kind, cut):
    model, batch = built(kind)
    first = next(iter(signals.attentions(model)))
    block = first.partition(".self_attn")[0].partition(".attention")[0]
    whole = f"{block}:input"

    def heard(parts):
        """d loss / d input of the block with the given projections cut off by hand, through one attention layer alone."""
        with read(model, [whole, f"{first}:scores", f"{first}:context"]) as found, stop_gradient(model, [f"{first}:{p}_input" for p in parts]):
            model(**batch)
        slope = torch.autograd.grad(found[f"{first}:scores"].square().sum(), found[whole], retain_graph=True, allow_unused=True)[0]
        return slope, torch.autograd.grad(found[f"{first}:context"].square().sum(), found[whole], allow_unused=True)[0]

    scores, context = heard(cut)
    assert (scores is None) == ({"query", "key"} <= set(cut)) and (context is None) == (len(cut) == 3)
    alone = [heard([p for p in ("query", "key", "value") if p != one])[1] for one in ("query", "key", "value") if one not in cut]
    if context is not None:
        assert torch.allclose(sum(alone), context, atol=1e-6), "the parts that are heard add up"
    names = signals.attentions(model)[first].parts
    with stop_gradient(model, [f"@attention:{p}_input" for p in cut]):
        model(**batch).logits.square().sum().backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in names), "the projections themselves learn on"
    assert clean(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["inside", "after"])
def test_taps_survive_gradient_checkpointing(kind, when):
    teacher, batch = built(kind, seed=1)
    with torch.no_grad(), read(teacher, "@attention:context") as given:
        teacher(**batch)
    cut = "@attention:query_input" if kind != "gpt2" else "*.c_attn:input"
    slopes = []
    for checkpointing in (False, True):
        model, _ = built(kind)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)                                       # dropout
        with read(model, ["@attention:scores", "@attention:projected", "*.1:output"]) as found, override(model, given), stop_gradient(model, cut):
            out = model(**batch).logits.square().sum() + sum(x.clamp(min=-100).square().sum() for x in found.values())
            count = len(found)
            if when == "inside":
                out.backward()
        if when == "after":
            out.backward()
        assert len(found) == count >= 5
        slopes.append([p.grad for p in model.parameters()])
        model.zero_grad()
        model(**batch)
        assert clean(model) and model.config._attn_implementation == "sdpa", "gone with the next forward at the latest"
    for a, b in zip(*slopes, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5))


def test_reentrant_checkpointing_is_refused():
    model, _ = built("llama")
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuleError, match="reentrant gradient checkpointing"), read(model, "*.self_attn:scores"):
        pass
    assert clean(model)


def test_nothing_costs_anything_while_nothing_is_read():
    model, batch = built("llama")
    assert clean(model) and model.config._attn_implementation == "sdpa"
    with read(model, "model.layers.*:output"):
        model(**batch)
        assert model.config._attn_implementation == "sdpa", "inputs and outputs need no attention of ours"
    assert clean(model)
    with read(model, "*:scores") as one, read(model, "*:probabilities") as two:
        model(**batch)
        assert model.config._attn_implementation == "qatlas"
    assert len(one) == len(two) == 2 and clean(model) and model.config._attn_implementation == "sdpa"


def test_each_forward_is_read_afresh_and_shared_layers_in_lists():
    model, batch = built("llama")
    with read(model, "*.1:output") as found:
        model(**batch)
        first = found["model.layers.1:output"]
        model(IDS[:, :4])
        assert found["model.layers.1:output"].shape[1] == 4 and first.shape[1] == 10
    albert = AlbertModel(AlbertConfig(**SIZE, vocab_size=64, embedding_size=16)).eval()
    with pytest.raises(QuantError, match=r"passed twice in one forward.*every=True"), read(albert, "*:scores"):
        albert(IDS)
    with read(albert, "*:scores", every=True) as found:
        albert(IDS)
    assert [len(x) for x in found.values()] == [2] and clean(albert)


@pytest.mark.parametrize(("address", "says"), [
    ("*.self_atn:scores", r"matches no module[\s\S]*nearest names: .*self_attn"),
    ("*.self_attn:probs", r"no signal probs, nearest: probabilities, .*all: input, output"),
    ("*.self_attn", r"names a module, not a signal; write '\*.self_attn:output'"),
    ("*.mlp:scores", r"model.layers.0.mlp \(LlamaMLP\) has no signal scores; it has input, output"),
    ("@head:key", r"lm_head \(Linear\) has no signal key")])
def test_wrong_addresses_name_what_there_is(address, says):
    model, _ = built("llama")
    for tap in (read(model, address), override(model, {address: torch.zeros(1)}), stop_gradient(model, address)):
        with pytest.raises(RuleError, match=says), tap:
            pass
    assert clean(model)


def test_overrides_of_another_shape_and_twice_are_refused():
    model, batch = built("llama")
    with pytest.raises(QuantError, match=r"model.layers.0.self_attn:context is \(2, 4, 10, 8\) in this model and is overridden by \(1, 4, 10, 8\)"), \
            override(model, {"*:context": torch.zeros(1, 4, 10, 8)}):
        model(**batch)
    with pytest.raises(RuleError, match="both override model.layers.0.self_attn.o_proj:output"), \
            override(model, {"*:projected": torch.clone, "*.o_proj:output": torch.clone}):
        pass
    assert clean(model)


@pytest.mark.parametrize("build", [
    lambda: DebertaV2Model(DebertaV2Config(**SIZE, vocab_size=64)), lambda: MPNetModel(MPNetConfig(**SIZE, vocab_size=64)),
    lambda: BloomModel(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    lambda: FalconModel(FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)),
    lambda: nn.TransformerEncoderLayer(32, 4, 48)])
def test_attention_of_another_kind_is_refused_by_name(build):
    model = build()
    with pytest.raises(RuleError, match=rf"the attention of {type(model).__name__} .*does not go through transformers' AttentionInterface"), \
            read(model, "*:scores"):
        pass
    if hasattr(model, "config"):
        with read(model.eval(), "*:output") as found:
            model(IDS)
        assert len(found) > 5 and clean(model)


@pytest.mark.parametrize(("build", "fused"), [
    (lambda: built("gpt2")[0], "transformer.h.0.attn.c_attn"),
    (lambda: Phi3ForCausalLM(Phi3Config(**SIZE, vocab_size=64, pad_token_id=0)), "model.layers.0.self_attn.qkv_proj")])
def test_inputs_that_are_one_tensor_are_not_told_apart(build, fused):
    model = build()
    with pytest.raises(RuleError, match=f"one matrix, {fused}: their inputs are one tensor.*'{fused}:input'"), stop_gradient(model, "*:key_input"):
        pass
    with stop_gradient(model, f"{fused}:input"):
        model(IDS)
