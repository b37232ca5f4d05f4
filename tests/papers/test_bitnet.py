"""BitNet: the exact checks of its sheet on tensors, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import FormatError, QuantError, RuleError, RunError
from qatlas.core.grid import Sign, Ternary
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quantizer
from qatlas.export import target
from qatlas.layers.linear import QLinear
from qatlas.layers.norm import Norm
from qatlas.layers.quantized import Slots
from qatlas.model.fresh import renew
from qatlas.model.pack import checkpoint, load_into, load_packed, pack, save
from qatlas.model.quantized import quantized, quantizers
from qatlas.model.rules import Rule
from qatlas.papers.bitnet import bitnet, of_input, of_weight, unnormed
from qatlas.train import data, fit
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

seeds = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None)
IDS = torch.arange(24).view(2, 12) % 32


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


class Look(Tactic):
    """What each step was taken with."""

    def __init__(self):
        self._seen = []

    def after(self, loop):
        blends = {q.blend for q in quantizers(loop.model).values()}
        decay = {group["weight_decay"] for group in loop.optimizer.param_groups if group["role"] == "weights"}
        self._seen.append((blends, decay, loop.optimizer.param_groups[0]["lr"]))


def steps_of(steps=8, **arguments):
    task, look = lm(), Look()
    task.run.tactics = (look,)
    return bitnet(tiny_llama(), task, steps=steps, **arguments), look._seen


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds, st.sampled_from([0.25, 0.3, 1.0, 7.0, 64.0]))
def test_scaling_the_weights_scales_what_they_become(seed, c):
    w = draw(seed, 8, 24)
    for bits in (1, 1.58):
        quant = of_weight(bits)
        once, scaled = quant.quantize(w), quant.quantize(c * w)
        assert (once.codes != scaled.codes).sum() <= 1            # a weight within rounding of a threshold may turn
        torch.testing.assert_close(scaled.steps, c * once.steps)


@few
@given(seeds)
def test_quantizing_what_is_quantized_keeps_the_codes_and_shrinks_the_scale_by_the_nonzero_share(seed):
    w = draw(seed, 16, 32)
    once = of_weight(1.58).quantize(w)
    twice = of_weight(1.58).quantize(once.dequantize())
    alive = (once.values() != 0).float().mean()
    assert torch.equal(once.codes, twice.codes) and 0.5 < alive < 0.85
    torch.testing.assert_close(twice.steps, once.steps * alive)


def test_packing_does_not_quantize_again():
    layer = QLinear.of(nn.Linear(64, 32), Slots(of_weight(1.58), of_input()))
    packed = layer.pack()
    assert torch.equal(packed.qtensor().steps, layer.weight.detach().abs().mean().reshape(1))
    assert torch.equal(packed.computed().detach(), layer.hard()) and not torch.equal(of_weight(1.58).hard(layer.hard()), layer.hard())


@few
@given(seeds)
def test_a_product_with_codes_is_corrected_by_the_sum_of_the_inputs(seed):
    w, x = of_weight(1.58).quantize(draw(seed, 8, 40)), of_input().quantize(draw(seed + 1, 5, 40))
    codes, tokens = w.codes.int(), x.values().int()
    assert int(x.values().min()) >= -127
    assert torch.equal(tokens @ (codes - 1).T, tokens @ codes.T - tokens.sum(1, keepdim=True))
    y = F.linear(x.dequantize(), w.dequantize())
    torch.testing.assert_close((tokens @ (codes - 1).T) * x.steps.reshape(-1, 1) * w.steps, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 1.58])
@pytest.mark.parametrize("keep", ["each", "buffer", "recompute"])
def test_the_gradient_has_no_mask(bits, keep):
    layer = QLinear.of(nn.Linear(48, 12, bias=False), Slots(of_weight(bits), of_input(), keep=keep))
    x, g = (3 * draw(0, 7, 48)).requires_grad_(), draw(1, 7, 12)
    for _ in range(2):                                            # a kept weight goes backward twice
        layer.weight.grad = x.grad = None
        layer(x).backward(g)
        torch.testing.assert_close(layer.weight.grad, g.T @ layer.input_quantizer.hard(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad, g @ layer.hard(), rtol=1e-6, atol=1e-6)


def test_one_bit_is_the_sign_around_the_mean_times_the_mean_size():
    w = draw(0, 9, 21, dtype=torch.float64) + 0.5
    wanted = w.abs().mean() * torch.where(w >= w.mean(), 1.0, -1.0).double()
    quant = of_weight(1)
    torch.testing.assert_close(quant.hard(w), wanted, rtol=1e-12, atol=0)
    assert not torch.equal(quant.hard(w).sign(), w.sign()), "the mean matters here"
    quantizer = quant.build()
    known = quantizer.known(w)
    for y in (quantizer(w), quantizer.hard(w), quantizer(w, known=known), quantizer.quantize(w).dequantize(), quant.quantize(w).dequantize()):
        torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=0)
    assert from_json(quant.to_json()) == quant and type(from_json(quant.to_json())).__name__ == "Centred"
    quantizer.on = False
    assert quantizer(w) is w


@few
@given(seeds)
def test_one_bit_is_stored_as_it_is_computed(seed):
    w, shift = draw(seed, 8, 24), draw(seed + 1, 8, 24)
    quantizer = of_weight(1).build()
    assert torch.equal(quantizer(w), quantizer.quantize(w).dequantize())
    assert torch.equal(quantizer(w, shift), quantizer.quantize(w, shift).dequantize())
    g = draw(seed + 2, 8, 24)
    quantizer(w, shift.requires_grad_()).backward(g)              # an adapter in the grid still learns
    torch.testing.assert_close(shift.grad, g * w.abs().mean())


def test_zeros_stay_finite():
    for bits in (1, 1.58):
        assert of_weight(bits).hard(torch.zeros(4, 8)).abs().max() <= 1e-5
    assert torch.equal(of_input().hard(torch.zeros(2, 8)), torch.zeros(2, 8))


# ---- the training ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, grid", [(1, Sign()), (1.58, Ternary())])
def test_one_scale_a_matrix_and_first_and_last_stay(bits, grid):
    model, _ = steps_of(2, bits=bits)
    layers = quantized(model)
    assert len(layers) == 14 and type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    for layer in layers.values():
        q = layer.quantize()
        assert q.grid == grid and q.steps.numel() == 1 and len(q.codes.unique()) == grid.count
        assert layer.input_quantizer.quant == of_input()


def test_lambda_rises_to_one_and_only_where_there_is_something_to_lose():
    _, seen = steps_of(8)
    assert [blends for blends, _, _ in seen] == [{1 / 3}, {2 / 3}] + 6 * [{1.0}]
    assert all(blends == {1.0} for blends, _, _ in steps_of(4, scratch=True)[1])
    assert [blends for blends, _, _ in steps_of(4, ramp=1.0, scratch=True)[1]] == [{0.25}, {0.5}, {0.75}, {1.0}]


def test_the_first_step_of_a_long_ramp_is_near_full_precision_and_what_is_stored_is_not():
    losses = {}
    for ramp in (0.0, 1.0):
        task = lm()
        model = bitnet(tiny_llama(), task, steps=200 if ramp else 1, ramp=ramp, lr=1e-9)
        losses[ramp] = task.run.histories[0].loss[0]
        assert all(q.blend == 1.0 for q in quantizers(model).values())
    full = lm()
    fit.fit(tiny_llama(), full, steps=1)
    full = full.run.histories[0].loss[0]
    assert abs(losses[1.0] - full) < 0.1 * abs(losses[0.0] - full)


def test_two_stages_of_rate_and_decay():
    _, seen = steps_of(8, warmup=0.0, lr=1.0e-3)
    assert [decay for _, decay, _ in seen] == 4 * [{0.1}] + 4 * [{0.0}]
    line = [1e-3 * (1 - (i + 0.5) / 8) for i in range(8)]
    assert [rate for _, _, rate in seen] == pytest.approx(line[:4] + [r * 2 / 3 for r in line[4:]])
    _, seen = steps_of(8, two_stage=False)
    assert all(decay == {0.1} for _, decay, _ in seen)


def test_scratch_forgets_what_was_learned_and_says_the_same_for_the_same_seed():
    first, again, other = tiny_llama(seed=0), tiny_llama(seed=1), tiny_llama(seed=0)
    state = torch.get_rng_state()
    renew(first, 5), renew(again, 5), renew(other, 6)
    assert torch.equal(torch.get_rng_state(), state), "a draw for itself"
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(first.config.initializer_range, rel=0.15)
    assert torch.equal(first.model.norm.weight, torch.ones(16))
    a, b = (bitnet(tiny_llama(seed=seed), lm(), scratch=True, steps=2).state_dict() for seed in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_it_resumes_mid_ramp_to_the_same_bits(tmp_path):
    class Stop(Tactic):
        def __init__(self, at=None):
            self._at = at

        def after(self, loop):
            if loop.step == self._at:
                assert {q.blend for q in quantizers(loop.model).values()} == {0.6}
                raise KeyboardInterrupt

    def one(out, at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(at),)
        return bitnet(tiny_llama(), task, ramp=0.8, sub_norm=True, steps=5)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", at=2)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


# ---- SubLN -----------------------------------------------------------------------------------------------------------------------------------------

def test_a_norm_stands_before_output_and_down_projections_and_learns():
    model, _ = steps_of(3, sub_norm=True, scratch=True, lr=1e-2)
    normed = {name: layer for name, layer in quantized(model).items() if layer.norm is not None}
    assert sorted({name.rpartition(".")[2] for name in normed}) == ["down_proj", "o_proj"] and len(normed) == 4
    for layer in normed.values():
        assert layer.slots.norm == Norm() and layer.norm.weight.shape == (layer.in_features,)
        assert not torch.equal(layer.norm.weight, torch.ones_like(layer.norm.weight))
        x = draw(0, 3, layer.in_features)
        normal = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
        torch.testing.assert_close(layer(x), F.linear(layer.input_quantizer.hard(normal), layer.hard()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x), layer(1000 * x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [1, 1.58])
def test_the_norm_survives_packing_saving_and_loading(bits, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         max_position_embeddings=64)
    model = bitnet(LlamaForCausalLM(config), lm(), bits=bits, sub_norm=True, steps=3, lr=1e-2)
    logits = model(IDS).logits
    save(model, tmp_path / "saved")
    loaded = load_packed(tmp_path / "saved")
    auto, into = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), load_into(LlamaForCausalLM(config), tmp_path / "saved")
    for other in (loaded, auto, into, pack(model)):
        assert torch.equal(other(IDS).logits, logits)
    assert not torch.equal(loaded.model.layers[1].mlp.down_proj.norm.weight, torch.ones(32))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load_packed(tmp_path / "again")(IDS).logits, logits)


def test_the_projections_are_found_under_other_names():
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert unnormed(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))) == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_proj", "mlp.c_proj")]
    assert unnormed(PhiForCausalLM(PhiConfig(**sizes)))[:2] == ["model.layers.0.self_attn.dense", "model.layers.0.mlp.fc2"]
    assert unnormed(Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8)))[:2] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]


def test_a_users_rule_stands_before_the_papers():
    task = lm(extra_rules=(Rule("*.o_proj", norm=None), Rule("*.down_proj", weight=None, input=None)))
    model = bitnet(tiny_llama(), task, sub_norm=True, steps=1)
    layers = quantized(model)
    assert layers["model.layers.0.self_attn.o_proj"].norm is None
    assert layers["model.layers.0.mlp.down_proj"].weight_quantizer is None and layers["model.layers.0.mlp.down_proj"].norm is not None
    assert torch.equal(pack(model)(IDS).logits, model(IDS).logits)


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------------

def test_sub_norm_with_a_target_is_refused_before_anything_moves():
    model = tiny_llama()
    before = model.lm_head.weight.clone()
    with pytest.raises(FormatError, match=r"attn_sub_norm, ffn_sub_norm"):
        bitnet(model, lm(target="gguf:q4_0"), sub_norm=True, scratch=True)
    assert torch.equal(model.lm_head.weight, before) and not quantized(model)


def test_no_export_holds_the_norm():
    model, _ = steps_of(1, sub_norm=True)
    with pytest.raises(QuantError, match=r"4 layers have a norm in front of them, for instance model\.layers\.0\.self_attn\.o_proj"):
        checkpoint(model)


@pytest.mark.parametrize("wrong, words", [({"bits": 2}, "1 or 1.58 bits, not bits=2"), ({"input_bits": 1}, "input_bits=1"),
                                          ({"input_bits": 16}, "2 to 8")])
def test_bits_outside_of_the_paper_are_refused(wrong, words):
    with pytest.raises(QuantError, match=words):
        bitnet(tiny_llama(), lm(), steps=1, **wrong)


@pytest.mark.parametrize("wrong", [{"ramp": 1.5}, {"ramp": -0.1}, {"warmup": 2.0}, {"steps": 0}])
def test_arguments_that_cannot_work(wrong):
    with pytest.raises(RunError):
        bitnet(tiny_llama(), lm(), **{"steps": 1, **wrong})


def test_models_that_have_no_configuration_or_no_projections():
    with pytest.raises(RunError, match="Sequential is not a model of transformers"):
        bitnet(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lm(), scratch=True)
    with pytest.raises(RuleError, match=r"0 of Sequential has no output projection .* its linear layers"):
        unnormed(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))))


def test_lambda_is_for_training_only():
    quantizer, x = Quantizer(of_weight(1.58)), draw(0, 4, 8)
    quantizer.blend = 0.5
    whole = of_weight(1.58).hard(x)
    torch.testing.assert_close(quantizer(x), (x + whole) / 2)
    assert torch.equal(quantizer.eval()(x), whole) and torch.equal(quantizer.quantize(x).dequantize(), whole)


@pytest.mark.parametrize("bits, kind", [(1.58, "tq2_0"), (1.58, "q8_0"), (1, "q4_0")])
def test_it_trains_for_the_target_and_packs_for_it(bits, kind, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = bitnet(LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes)), lm(target=f"gguf:{kind}"), bits=bits, steps=2)
    module, kind = target(f"gguf:{kind}")
    found = module.read(module.write(checkpoint(model), tmp_path / "model.gguf", kind))
    for name, layer in quantized(model).items():
        assert torch.equal(found[f"{name}.weight"], layer.hard())
        assert layer.hard().abs().unique().tolist()[-1] == float(layer.weight.detach().abs().mean().half())
