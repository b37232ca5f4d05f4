"""QuEST: the exact checks of its sheet on tensors, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import FormatError, QatlasError, QuantError, RunError
from qatlas.core.estimator import Clip, Ste, Trust
from qatlas.core.grain import PerChannel, PerToken
from qatlas.core.hadamard import hadamard
from qatlas.core.quantizer import Quantizer
from qatlas.core.transform import Hadamard
from qatlas.export import target
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.exportable import can_export
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.quantized import quantized, quantizers
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers import quest as paper
from qatlas.papers.quest import GAUSS, gaussian, quest
from qatlas.train import data, fit
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
IDS = torch.arange(24).view(2, 12) % 32


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def layer(bits=2, input_bits=2, trust=None, **more):
    torch.manual_seed(0)
    slots = Slots(gaussian(bits, PerChannel(), trust), gaussian(input_bits, PerToken(), trust), transform=Hadamard(most=128))
    return QLinear.of(nn.Linear(256, 24, bias=False).double(), slots.but(**more))


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds, st.sampled_from([1, 1.58, 2, 3, 4]))
def test_a_row_has_all_levels_evenly_up_to_the_clip(seed, bits):
    z = 3 * draw(seed, 2, 5000, dtype=torch.float64)
    y = gaussian(bits, PerToken()).hard(z)
    for row, values in zip(z, y, strict=True):
        levels, r = values.unique(), row.square().mean().sqrt()
        assert len(levels) == (3 if bits == 1.58 else 2**bits)
        torch.testing.assert_close(levels, -levels.flip(0))
        torch.testing.assert_close(levels[-1], GAUSS[bits] * r)
        torch.testing.assert_close(levels.diff(), levels.diff().mean().expand(len(levels) - 1))


@pytest.mark.parametrize(("bits", "error"), [(1, 0.36338), (1.58, 0.19017), (2, 0.118846), (3, 0.0374397), (4, 0.0115429)])
def test_the_clip_is_that_of_least_error_for_normal_numbers(bits, error):
    x = draw(0, 1, 400000)
    found = {c: (gaussian(bits, PerToken()).but(scale=gaussian(bits, PerToken()).scale.but(times=gaussian(bits, PerToken()).scale.times * c))
                 .hard(x) - x).square().mean().item() for c in (0.97, 1.0, 1.03)}
    assert found[1.0] == pytest.approx(error, rel=0.01) and found[1.0] < min(found[0.97], found[1.03])


def test_eight_bits_are_near_and_one_bit_is_the_sign():
    x = draw(1, 5, 1000)
    assert ((gaussian(8, PerToken()).hard(x) - x).norm() / x.norm()) < 1e-2
    wanted = math.sqrt(2 / math.pi) * x.square().mean(-1, keepdim=True).sqrt() * x.sign()
    torch.testing.assert_close(gaussian(1, PerToken()).hard(x), wanted)


def test_a_row_of_zeros_becomes_zeros():
    assert gaussian(2, PerToken()).hard(torch.zeros(2, 8)).abs().max() < 1e-30


@pytest.mark.parametrize(("bits", "limit", "share"), [(4, {}, 0.0073), (2, {}, 0.046), (1, {"trust": GAUSS[1]}, 0.111), (1, {}, 0.30)])
def test_how_many_normal_values_are_not_trusted(bits, limit, share):
    x = draw(2, 1, 400000).requires_grad_()
    Quantizer(gaussian(bits, PerToken(), **limit))(x).sum().backward()
    assert (x.grad == 0).float().mean().item() == pytest.approx(share, rel=0.03)
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}


def test_trust_is_measured_in_root_mean_squares_and_clip_in_last_levels():
    z = draw(3, 1, 5000, dtype=torch.float64)
    r = z.square().mean().sqrt()
    for bits in (1.58, 2, 4):
        for limit, passes in (({"trust": 0.1}, lambda y: (y - z).abs() <= 0.1 * r), ({"clip": 0.8}, lambda y, b=bits: z.abs() <= 0.8 * GAUSS[b] * r)):
            x = z.clone().requires_grad_()
            y = Quantizer(gaussian(bits, PerToken(), **limit))(x)
            y.backward(torch.ones_like(z))
            assert torch.equal(x.grad.bool(), passes(y.detach()))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradients_are_the_masked_ones_rotated_back(bits):
    both, x, g = layer(bits, bits), (2 * draw(4, 7, 256, dtype=torch.float64)).requires_grad_(), draw(5, 7, 24, dtype=torch.float64)
    turn = lambda t: hadamard(t.unflatten(-1, (-1, 128))).flatten(-2)  # noqa: E731
    both(x).backward(g)
    masks = []
    for t, quantizer in ((x, both.input_quantizer), (both.weight, both.weight_quantizer)):
        z = turn(t.detach())
        r = z.square().mean(-1, keepdim=True).sqrt()
        a = GAUSS[bits] * r
        masks.append(z.abs() <= 1.3 * a if bits == 1 else (quantizer.hard(z) - z).abs() <= a / (2**bits - 1) * (1 + 1e-12))
    qx, qw = both.input_quantizer.hard(turn(x.detach())), both.weight_quantizer.hard(turn(both.weight.detach()))
    torch.testing.assert_close(x.grad, turn((g @ qw) * masks[0]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(both.weight.grad, turn((g.T @ qx) * masks[1]), rtol=1e-10, atol=1e-10)


@few
@given(seeds)
def test_multiplying_rotated_and_rotating_back_are_the_same(seed):
    half, x, g = layer(), draw(seed, 5, 256, dtype=torch.float64), draw(seed + 1, 5, 24, dtype=torch.float64)
    one, other, w = x.clone().requires_grad_(), x.clone().requires_grad_(), half.weight.detach().clone().requires_grad_()
    turn = lambda t: hadamard(t.unflatten(-1, (-1, 128))).flatten(-2)  # noqa: E731
    y = half(one)
    full = F.linear(turn(half.input_quantizer(turn(other))), turn(half.weight_quantizer(turn(w))))
    torch.testing.assert_close(y, full)
    y.backward(g), full.backward(g)
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(half.weight.grad, w.grad)
    torch.testing.assert_close(half.hard(), turn(half.weight_quantizer.hard(turn(w.detach()))))


@pytest.mark.parametrize("keep", ["buffer", "recompute"])
def test_the_rotated_weight_may_be_kept(keep):
    one, other, x = layer(), layer(keep=keep), draw(8, 3, 256, dtype=torch.float64)
    for module in (one, other):
        for _ in range(2):
            module(x).sum().backward()
    assert torch.equal(one.weight.grad, other.weight.grad) and torch.equal(one(x), other(x))


def test_the_estimators_of_one_bit_and_those_that_are_asked_for():
    assert gaussian(1, PerToken()).estimator == Clip(at=1.3) and gaussian(1, PerToken(), cut=1.25).estimator == Clip(at=1.25)
    assert gaussian(1, PerToken(), trust=GAUSS[1]).estimator == Trust(1.0) and gaussian(1.58, PerToken()).estimator == Trust(0.5)
    assert gaussian(3, PerToken(), clip=1.0).estimator == Clip(at=3.5)


# ---- the function ----------------------------------------------------------------------------------------------------------------------------------

def test_every_layer_is_rotated_and_quantized_on_both_sides_but_embedding_and_head():
    model = quest(tiny_llama(), lm(), bits=2, input_bits=3, steps=2)
    layers = quantized(model)
    assert len(layers) == 14 and all("layers" in name for name in layers)
    for one in layers.values():
        assert one.slots.transform == Hadamard(most=128) and one.transform.block == one.in_features
        assert len(one.quantize().codes.unique()) == 4 and one.input_quantizer.quant == gaussian(3, PerToken())
    assert not [name for name, _ in model.named_parameters() if "quantizer" in name], "nothing is learned but the weights"
    assert type(model.lm_head) is nn.Linear


def test_without_a_rotation_one_bit_cuts_earlier():
    model = quest(tiny_llama(), lm(), bits=1, input_bits=1, hadamard=None, steps=1)
    assert {q.quant.estimator for q in quantizers(model).values()} == {Clip(at=1.25)}
    assert {one.transform for one in quantized(model).values()} == {None}
    model = quest(tiny_llama(), lm(), bits=1, input_bits=None, steps=1)
    assert {q.quant.estimator for q in quantizers(model).values()} == {Clip(at=1.3)} and len(quantizers(model)) == 14


def test_endless_trust_is_the_plain_straight_through_gradient():
    """The same run with Ste() in Trust(inf)'s place: bit for bit."""
    told, plain = quest(tiny_llama(), lm(), bits=2, input_bits=2, trust=math.inf, steps=3), tiny_llama()
    weight, inputs = (gaussian(2, grain).but(estimator=Ste()) for grain in (PerChannel(), PerToken()))
    quantize(plain, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=weight, input=inputs, transform=Hadamard(most=128))])
    fit.fit(plain, lm(), optimizer=paper.AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)), schedule=paper.cosine(0.1, end=0.1), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(told.state_dict().values(), plain.state_dict().values(), strict=True))
    half = quest(tiny_llama(), lm(), bits=2, input_bits=2, steps=3)
    assert not torch.equal(half.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)


def test_the_schedule_ends_at_a_tenth_and_decay_is_for_matrices():
    seen = []

    class Look(Tactic):
        def after(self, loop):
            seen.append({group["role"]: (group["lr"], group["weight_decay"]) for group in loop.optimizer.param_groups})

    task = lm()
    task.run.tactics = (Look(),)
    quest(tiny_llama(), task, lr=1e-2, steps=20)
    rates = [step["weights"][0] for step in seen]
    assert max(rates) == pytest.approx(1e-2, rel=0.01) and rates[-1] == pytest.approx(1e-3, rel=0.05) and rates[0] < rates[2]
    assert {step["weights"][1] for step in seen} == {0.1} and {step["norms"][1] for step in seen} == {0.0}


def test_scratch_forgets_what_was_learned():
    a, b = (quest(tiny_llama(seed=seed), lm(), scratch=True, steps=2).state_dict() for seed in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    kept = quest(tiny_llama(seed=1), lm(), steps=2).state_dict()
    assert not torch.equal(a["model.layers.0.mlp.up_proj.weight"], kept["model.layers.0.mlp.up_proj.weight"])


def test_neither_a_later_token_nor_a_neighbour_is_heard():
    model = quest(tiny_llama(), lm(), bits=2, input_bits=2, steps=1).requires_grad_(False)
    whole, later, neighbour = model(IDS).logits, IDS.clone(), IDS.clone()
    later[:, 8:], neighbour[1] = 5, 3
    assert torch.equal(model(later).logits[:, :8], whole[:, :8]) and torch.equal(model(neighbour).logits[0], whole[0])


def test_a_packed_directory_holds_the_rotation(tmp_path):
    model = quest(tiny_llama(), lm(), bits=2, input_bits=2, steps=2)
    model.set_attn_implementation("sdpa")                         # as it is loaded
    logits = model(IDS).logits
    save(model, tmp_path / "saved")
    assert torch.equal(load_packed(tmp_path / "saved")(IDS).logits, logits)
    with pytest.raises(QuantError, match="has a transform, which no exported weight contains"):
        checkpoint(model)
    answers = can_export(model, "gguf:q8_0")
    assert len(answers) == 14 and all("transformed in front" in answer.reason for answer in answers)


@pytest.mark.parametrize("bits, name", [(1, "gguf:tq2_0"), (1.58, "gguf:tq2_0"), (2, "gguf:q4_0"), (3, "gguf:q4_0"), (4, "gguf:q8_0"),
                                        (4, "compressed-tensors:w8a16")])
def test_without_a_rotation_it_trains_for_a_target_and_packs_for_it(bits, name):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=64))
    model = pack(quest(model, lm(target=name), bits=bits, input_bits=None, hadamard=None, steps=2))
    form, kind = target(name)
    assert all(answer.held for answer in can_export(model, name)) and (not hasattr(form, "plan") or form.plan(checkpoint(model), kind))


def test_a_rotation_is_refused_by_a_target_before_anything_moves(monkeypatch):
    monkeypatch.setattr(fit, "_steps", None)
    with pytest.raises(FormatError, match=r"hadamard=128 and the target gguf:q8_0 .*hadamard=None"):
        quest(tiny_llama(), lm(target="gguf:q8_0"))
    with pytest.raises(FormatError, match=r"q_proj: gguf:q8_0 holds weights, and has no place for the Hadamard transform"):
        quantize(tiny_llama(), [Rule("*proj", weight=gaussian(3, PerChannel()), transform=Hadamard())], lm(target="gguf:q8_0"))
    with pytest.raises(FormatError, match="HalfStep"):
        quest(tiny_llama(), lm(target="gguf:q4_0"), bits=4, input_bits=None, hadamard=None)


@pytest.mark.parametrize("wrong, words", [({"bits": 9}, "not 9"), ({"bits": 2.5}, "not 2.5"), ({"input_bits": 0}, "not 0"),
                                          ({"trust": 1.0, "clip": 1.0}, "one of the two"), ({"trust": -1.0}, "0 or more"),
                                          ({"clip": 0.0}, "more than 0"), ({"hadamard": 12}, "power of two"),
                                          ({"steps": 0}, "steps=0"), ({"warmup": -1.0}, "warmup")])
def test_arguments_that_cannot_work(wrong, words):
    with pytest.raises(QatlasError, match=words):
        quest(tiny_llama(), lm(), **{"steps": 1, **wrong})


def test_scratch_needs_a_model_that_knows_its_class():
    with pytest.raises(RunError, match="scratch=True"):
        quest(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lm(), scratch=True)


def test_a_users_rule_stands_before_the_papers():
    model = quest(tiny_llama(), lm(extra_rules=(Rule("*.down_proj", transform=None),)), steps=1)
    assert {name.rpartition(".")[2] for name, one in quantized(model).items() if one.transform is None} == {"down_proj"}


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return quest(tiny_llama(), task, bits=1, input_bits=1, scratch=True, steps=4)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=2)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
