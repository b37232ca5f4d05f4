"""Quantizers inside attention: by rules, through calibration, describe, pack, save and load; and a decoder stays causal with them."""

import contextlib
import copy
import json

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig
from transformers import ViTForImageClassification as ViT

from qatlas.core.error import CheckpointError, QuantError, RuleError
from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.scheme import scheme, weight
from qatlas.layers.attention import QUANTIZED, attached
from qatlas.model import inner, signals
from qatlas.model.coverage import describe
from qatlas.model.pack import checkpoint, load_into, load_packed, pack, save
from qatlas.model.quantized import quantizers
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.taps import override, read, stop_gradient
from qatlas.train.calibrate import calibrate

IDS = torch.arange(24).view(2, 12) * 7 % 60 + 1
A8 = scheme("w4a8").input
A4 = scheme("w4a4").input
P8 = A8.but(grid=Uniform(8, None))
STATIC = Quant(Uniform(8, None), PerTensor(), Learned(AbsMax()), Clip())
HEADS = STATIC.but(grain=PerChannel(1))
WEIGHTS = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*proj", weight=weight(4))]


def inside(quant, probabilities=None):
    return [Rule(f"@attention:{s}", signal=quant) for s in QUANTIZED[:3]] + [Rule("@attention:probabilities", signal=probabilities or quant)]


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        vocab_size=64, **more)).eval()


class Task:
    target, extra_rules = None, ()

    def calibration(self, n=8):
        return [{"input_ids": IDS}]

    def logits(self, model, batch):
        return model(**batch).logits

    def calibrate(self, model):
        calibrate(model, self)


def test_rules_reach_inside_attention_and_describe_sees_it():
    model = quantize(llama(), [Rule("*.0.self_attn:key", signal=A4), *keep_full("*.1.self_attn"), *inside(A8, P8), *WEIGHTS])
    cover = describe(model, {"input_ids": IDS}).check()
    assert {s.address: s.calls for s in cover.signals} == {f"model.layers.0.self_attn:{s}": (1, 1) for s in QUANTIZED}, "the first rule wins"
    held = attached(model.model.layers[0].self_attn)
    assert held["key"].quant == A4 and held["value"].quant == A8 and held["probabilities"].quant.grid == Uniform(8, False)
    assert model.config._attn_implementation == "qatlas"
    assert [row.bits for row in cover.rows].count(4.0) == 10, "all of the kept module is full, its four projections too"
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuleError, match=r"4 quantizers never ran.*query_quantizer"):
        describe(model, {"input_ids": IDS}).check()


def test_encoders_and_vision_alike_and_a_model_of_the_same_configuration_stays_as_it_is():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model, other = BertModel(config).eval(), BertModel(config).eval()
    quantize(model, inside(A8, P8))
    describe(model, {"input_ids": IDS})
    assert config._attn_implementation == other.config._attn_implementation == "sdpa" and model.config._attn_implementation == "qatlas"
    with read(other, "*:scores"):
        other(IDS)
    assert len(inner.installed(model)) == 8 and other.config._attn_implementation == "sdpa"
    vit = ViT(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4))
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert all(s.calls == (1, 1) for s in describe(quantize(vit, inside(A8, P8)), pixels).signals)


def test_a_tap_stands_before_its_quantizer():
    model = quantize(llama(), inside(A4, P8.but(grid=Uniform(4, False))))
    with read(model, ["*.0.self_attn:value", "*.0.self_attn:probabilities", "*.0.self_attn:context"]) as found:
        model(IDS)
    value, probs, context = found.values()
    held = attached(model.model.layers[0].self_attn)
    assert not torch.equal(held["value"](value), value)
    assert torch.equal(held["probabilities"](probs) @ held["value"](value).repeat_interleave(2, 1), context)
    with override(model, {"*:value": torch.zeros_like(value)}), read(model, "*:context") as found:
        model(IDS)
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize(("where", "quant", "says"), [
    ("*.self_attn:scores", A8, "scores can be read and overridden, but has no quantizer.*query, key, value, probabilities"),
    ("*.self_attn:output", A8, "can be read and overridden, but has no quantizer"),
    ("*.self_attn:keys", A8, "no signal keys, nearest: key"),
    ("*.self_atn:key", A8, r"rule 1: .* matches no module[\s\S]*nearest names: .*self_attn"),
    ("*.mlp:key", A8, "LlamaMLP.* has no signal key; it has input, output")])
def test_wrong_addresses_in_rules(where, quant, says):
    with pytest.raises(RuleError, match=says):
        quantize(llama(), [Rule(where, signal=quant)])


def test_what_cannot_be_is_refused_before_anything_changes():
    model = llama()
    with pytest.raises(QuantError, match=r"model.layers.0.self_attn:probabilities lie in \[0, 1\].*Uniform\(8, False\)"):
        quantize(model, [*inside(A8), *WEIGHTS])
    assert not quantizers(model) and model.config._attn_implementation == "sdpa"
    with pytest.raises(RuleError, match="the attention of BloomForCausalLM .*does not go through transformers' AttentionInterface"):
        quantize(BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)), [Rule("*.self_attention:key", signal=A8)])
    with pytest.raises(RuleError, match="key_quantizer is quantized already"):
        quantize(quantize(llama(), [Rule("*:key", signal=A8)]), "w4")


def test_rules_go_to_json_and_back():
    rules = [*inside(A8, P8), *WEIGHTS]
    again = from_json(json.loads(json.dumps([rule.to_json() for rule in rules])))
    assert list(again) == rules
    assert torch.equal(quantize(llama(), rules)(IDS).logits, quantize(llama(), again)(IDS).logits)


@pytest.mark.parametrize("quant", [STATIC, HEADS])
def test_static_scales_are_calibrated_and_learn(quant):
    model = quantize(llama(), inside(quant))
    with pytest.raises(QuantError, match="before it is initialised"):
        model(IDS)
    assert calibrate(model, Task()) == 8
    held = attached(model.model.layers[0].self_attn)
    assert not held["probabilities"].quant.grid.signed and held["key"].quant.grid.signed
    assert held["key"].scale.shape == (1 if quant is STATIC else 2,)
    assert (model(IDS).logits - llama()(IDS).logits).abs().max() < 0.02
    model(IDS).logits.square().sum().backward()
    assert all(q.scale.grad is not None and q.scale.grad.isfinite().all() for q in inner.installed(model).values())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("quant", [A8, STATIC, HEADS])
def test_packed_saved_and_loaded_is_bit_exact(quant, tmp_path):
    model = quantize(llama(), [*inside(quant, P8 if quant is A8 else quant), *WEIGHTS], Task())
    before = model(IDS).logits
    path = save(model, tmp_path / "out")
    assert "attn" not in " ".join(key for key in json.loads((path / "config.json").read_text()) if key != "num_attention_heads")
    for loaded in (load_packed(path), load_into(llama(), path)):
        assert torch.equal(loaded(IDS).logits, before) and loaded.config._attn_implementation == "qatlas"
        assert inner.metas(loaded) == inner.metas(model) and not any(t.is_meta for t in loaded.state_dict().values())
    assert torch.equal(AutoModel.from_pretrained(path)(IDS)[0], model.model(IDS)[0])
    half = load_packed(path, dtype=torch.bfloat16)
    assert all(q.scale is None or q.scale.dtype == torch.float32 for q in inner.installed(half).values())
    assert half(IDS).logits.dtype == torch.bfloat16
    pack(model)
    assert torch.equal(model(IDS).logits, before)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_packed(tmp_path / "again")(IDS).logits, before)
    assert not any("quantizer" in name for name in checkpoint(model).tensors), "an export holds weights"
    assert describe(model, {"input_ids": IDS}).check().signals


def test_a_broken_description_is_one_error_and_changes_nothing(tmp_path):
    path = save(quantize(llama(), [*inside(STATIC), *WEIGHTS], Task()), tmp_path / "out")
    whole = json.loads((path / "config.json").read_text())
    key = "model.layers.0.self_attn:key"
    for address, meta, says in (("model.layers.7.self_attn:key", {}, "a quantizer at 'model.layers.7.self_attn:key', which LlamaForCausalLM lacks"),
                                (key, {"quant": {"is": "os:system"}}, "os:system"), (key, {"quant": 3}, "cannot be read"),
                                (key, {"state": {"scale": [3]}}, "does not hold this model")):
        broken = copy.deepcopy(whole)
        signals = broken["quantization_config"]["signals"]
        signals[address] = signals[key] | meta
        (path / "config.json").write_text(json.dumps(broken))
        model = llama()
        with pytest.raises(CheckpointError, match=says):
            load_into(model, path)
        assert not quantizers(model) and model.config._attn_implementation == "sdpa" and torch.equal(model(IDS).logits, llama()(IDS).logits)
        with pytest.raises(CheckpointError, match=says):
            load_packed(path)


@pytest.mark.parametrize("form", ["trained", "packed"])
@pytest.mark.parametrize("window", [None, 4])
def test_law_12_holds_with_one_scale_a_token(form, window):
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    model = llama() if window is None else MistralForCausalLM(MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        sliding_window=window)).eval()
    quantize(model, [*inside(A4, P8), *keep_full(Role.EMBEDDING, Role.HEAD), Rule("*proj", weight=weight(4), input=A8)])
    model = pack(model) if form == "packed" else model
    whole, later, neighbour = model(IDS).logits, IDS.clone(), IDS.clone()
    later[:, 8:], neighbour[1] = 5, 3
    assert torch.equal(model(later).logits[:, :8], whole[:, :8])
    assert torch.equal(model(neighbour).logits[0], whole[0])
    prefill = model(IDS[:, :8], use_cache=True)
    rest = model(IDS[:, 8:], past_key_values=prefill.past_key_values).logits
    assert (torch.cat([prefill.logits, rest], 1) - whole).abs().max() < 1e-5
    written = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(written[:, 12:], model(written[:, :-1]).logits[:, 11:].argmax(-1)), "generation with the cache is the whole forward"


def test_one_fresh_scale_a_tensor_is_the_known_exception_to_law_12():
    model = quantize(llama(), [Rule("@attention:key", signal=A4.but(grain=PerTensor()))])
    later = IDS.clone()
    later[:, 8:] = 5
    assert not torch.equal(model(later).logits[:, :8], model(IDS).logits[:, :8])


ALL = {"embeddings", "ffn", "q", "k", "v", "o"}
TABLE = {                                                          # mode -> what is overridden, where gradients stop, what the loss reaches
    "none": (None, "", ALL),
    "TI-M": ("probabilities", "qk", ALL - {"q", "k"}),
    "TI-C": ("context", "qkv", ALL - {"q", "k", "v"}),
    "TI-O": ("projected", "qkv", ALL - {"q", "k", "v", "o"}),
}


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
@pytest.mark.parametrize("mode", TABLE)
def test_the_gradient_table_of_teacher_intervention(kind, mode):
    """Sheet teacher-intervention, 3.3: with the teacher inside, query and key hear the scores of their own layer alone, and what stands before the
    intervention hears nothing of the model's loss."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    build = {"bert": lambda: BertModel(BertConfig(**size, vocab_size=64)), "llama": llama,
             "vit": lambda: ViT(ViTConfig(**size, image_size=16, patch_size=4))}[kind]
    torch.manual_seed(2)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "vit" else {"input_ids": IDS}
    signal, cut, heard = TABLE[mode]
    torch.manual_seed(0)
    teacher, student = build().eval(), build().eval()
    quantize(student, [*inside(A8, P8), *keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight(2), input=A8)])
    with torch.no_grad(), read(teacher, ["*:scores", *([f"*:{signal}"] if signal else [])]) as given:
        teacher(**batch)
    scores = {address: x for address, x in given.items() if address.endswith(":scores")}
    part = {"q": "query_input", "k": "key_input", "v": "value_input"}
    around = signals.attentions(student)
    with read(student, "*:scores") as own, contextlib.ExitStack() as stack:
        if signal:
            stack.enter_context(override(student, {a: x for a, x in given.items() if a not in scores}))
            stack.enter_context(stop_gradient(student, [f"*:{part[p]}" for p in cut]))
        out = student(**batch)[0]
    groups = {which: [f"{name}.weight" for one in around.values() for name in names(one)] for which, names in
              {"q": lambda o: o.parts[:1], "k": lambda o: o.parts[1:2], "v": lambda o: o.parts[2:], "o": lambda o: [o.out]}.items()}
    taken = {name for names in groups.values() for name in names}
    groups["embeddings"] = [n for n, _ in student.named_parameters() if "embed" in n and n.endswith(("weight", "embeddings"))][:1]
    groups["ffn"] = [n for n, p in student.named_parameters() if n not in taken and tuple(p.shape) in {(48, 32), (32, 48)}]
    weights = dict(student.named_parameters())

    def slopes(loss, names):
        return torch.autograd.grad(loss, [weights[n] for n in names], retain_graph=True, allow_unused=True)

    for which, names in groups.items():
        assert names and all((g is not None) == (which in heard) for g in slopes(out.square().sum(), names)), (mode, which)
    for index, (address, theirs) in enumerate(scores.items()):
        loss = (own[address].clamp(min=-100) - theirs.clamp(min=-100)).square().mean()
        for which in "qk":
            mine = [g is not None and bool(g.any()) for g in slopes(loss, groups[which])]
            assert mine[index] and not any(mine[index + 1:]) and (not signal or sum(mine) == 1), "own layer alone"
        lower = slopes(loss, [*groups["embeddings"], *groups["ffn"]])
        assert all(g is None or not g.any() for g in lower) == bool(signal)


def test_training_with_static_scales_inside_and_checkpointing():
    ends = []
    for checkpointing in (False, True):
        model = quantize(llama(), [*inside(HEADS), *WEIGHTS], Task()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        ends.append(model.state_dict())
    start = quantize(llama(), [*inside(HEADS), *WEIGHTS], Task()).state_dict()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*map(dict.values, ends), strict=True))
    moved = [name for name in start if name.endswith("_quantizer.scale") and "self_attn." in name and "proj" not in name]
    assert len(moved) == 8 and all(not torch.equal(start[name], ends[0][name]) for name in moved)
