"""LSQ: what the paper promises, seen on a Llama of two layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama

from qatlas.core.error import FormatError, QatlasError, QuantError
from qatlas.core.grain import Group, PerTensor
from qatlas.core.grid import Ternary, Uniform
from qatlas.export import target
from qatlas.model.pack import checkpoint, pack
from qatlas.model.quantized import quantized, quantizers
from qatlas.model.rules import Rule
from qatlas.papers.lsq import lsq
from qatlas.train import data, fit
from qatlas.train.evaluate import evaluate
from qatlas.train.labelled import Images
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

BITS = (1.58, 2, 3, 4, 8)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def before_and_after(task=None, **arguments):
    """The model, and a copy of its parameters as they were before the first step."""
    seen = {}

    class Look(Tactic):
        def start(self, loop):
            seen.update({name: p.detach().clone() for name, p in loop.model.named_parameters()})

    task = task or lm()
    task.run.tactics = (Look(),)
    model = lsq(tiny_llama(), task, **{"steps": 2, "lr": 1e-3, "warmup": 0.0, **arguments})
    return model, seen


@pytest.mark.parametrize("bits", BITS)
def test_every_weight_and_every_step_moves(bits):
    model, seen = before_and_after(bits=bits, input_bits=8, static=True)
    still = [name for name, p in model.named_parameters() if torch.equal(p, seen[name])]
    assert not still
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for name, layer in quantized(model).items():
        moved = (layer.weight_quantizer.scale != seen[f"{name}.weight_quantizer.scale"]).float().mean()
        assert moved > 0.9, f"{name}: {moved:.0%} of the steps moved"


@pytest.mark.parametrize("bits", BITS)
def test_the_weights_lie_on_the_grid_and_first_and_last_do_not(bits):
    model, _ = before_and_after(bits=bits)
    layers = quantized(model)
    assert len(layers) == 14 and all("layers" in name for name in layers)
    grid = Ternary() if bits == 1.58 else Uniform(bits)
    for layer in layers.values():
        q = layer.quantize()
        assert q.grid == grid and len(q.codes.unique()) <= (3 if bits == 1.58 else 2**bits)
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding


def test_eight_bits_stay_near_full_precision_and_two_do_not():
    task, model = lm(), tiny_llama()
    full = evaluate(model, task)["loss"]
    off = {bits: abs(evaluate(lsq(tiny_llama(), lm(), bits=bits, steps=1, lr=1e-9), task)["loss"] - full) for bits in (8, 2)}
    assert off[8] < 1e-3 < off[2]


def test_eight_bit_steps_stay_near_their_start():
    model, seen = before_and_after(bits=8, steps=4, lr=1e-4)
    for name, quantizer in quantizers(model).items():
        start = seen[f"{name}.scale"]
        assert ((quantizer.scale - start).abs() / start).max() < 0.1


@pytest.mark.parametrize("arguments, rate", [({"lr": 1e-2}, 1e-2), ({"lr": 1e-2, "scale_lr": 5e-4}, 5e-4)])
def test_steps_have_a_learning_rate_of_their_own_and_no_decay(arguments, rate):
    groups, steps = {}, []

    class Look(Tactic):
        def after(self, loop):
            groups.update({group["role"]: group for group in loop.optimizer.param_groups})
            steps.extend(group for group in loop.optimizer.param_groups if group["role"] == "scales")

    task = lm()
    task.run.tactics = (Look(),)
    lsq(tiny_llama(), task, steps=1, weight_decay=0.3, **arguments)
    assert groups["scales"]["base_lr"] == pytest.approx(rate) and groups["weights"]["base_lr"] == 1e-2
    assert (groups["scales"]["weight_decay"], groups["norms"]["weight_decay"], groups["weights"]["weight_decay"]) == (0, 0, 0.3)
    assert len(steps) == 14 and all(group["relative"] for group in steps)     # each in units of its own size
    assert all(group["lr"] < rate * 0.5 for group in steps)


def test_group():
    model, _ = before_and_after(group=8)
    for layer in quantized(model).values():
        assert layer.weight_quantizer.quant.grain == Group(8)
        assert layer.weight_quantizer.scale.numel() == layer.weight.numel() // 8


def test_static_inputs_are_calibrated_and_know_whether_they_are_signed():
    model, seen = before_and_after(bits=4, input_bits=4, static=True)
    for name, layer in quantized(model).items():
        q = layer.input_quantizer
        assert q.ready and q.quant.grain == PerTensor() and q.quant.grid.signed is True and q.scale.numel() == 1
        assert not torch.equal(seen[f"{name}.input_quantizer.scale"], q.scale)


def test_an_input_that_is_never_negative_gets_the_unsigned_grid(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (40, 2, 2, 3), dtype=np.uint8), y=np.arange(40) % 2)
    task = Images(str(tmp_path / "images.npz"), batch=8, run=Run(progress=False))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    model = lsq(model, task, bits=4, input_bits=4, static=True, steps=2)
    assert (model[1].input_quantizer.quant.grid.signed, model[3].input_quantizer.quant.grid.signed) == (True, False)
    assert type(model[4]) is torch.nn.Linear


def test_dynamic_inputs_have_no_step_to_learn():
    model, _ = before_and_after(input_bits=8)
    for layer in quantized(model).values():
        assert layer.input_quantizer is not None and "input_quantizer.scale" not in dict(layer.named_parameters())


def test_distil_learns_from_the_teacher_and_not_from_the_labels():
    """At 8 bits the divergence from the full-precision model starts near zero, the cross entropy of the labels does not."""
    plain, taught = lm(), lm()
    losses = {}
    for name, task, distil in (("labels", plain, False), ("teacher", taught, True)):
        lsq(tiny_llama(), task, bits=8, distil=distil, steps=1)
        losses[name] = task.run.histories[0].loss[0]
    assert losses["teacher"] < 1e-3 < losses["labels"]
    student = tiny_llama()
    start = copy.deepcopy(student.state_dict())
    lsq(student, lm(), bits=2, distil=True, steps=2, lr=1e-2)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, start["model.layers.0.mlp.up_proj.weight"])


def test_a_users_rule_stands_before_the_papers():
    rule = Rule("*.down_proj", weight=None)
    model = lsq(tiny_llama(), lm(extra_rules=(rule,)), steps=1)
    assert not any(name.endswith("down_proj") for name in quantized(model)) and len(quantized(model)) == 12


@pytest.mark.parametrize("bits, name", [(8, "q8_0"), (4, "q4_0"), (3, "q4_0"), (2, "q4_0"), (1.58, "q4_0")])
def test_it_trains_for_the_target_and_packs_for_it(bits, name):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=64))
    task = lm(target=f"gguf:{name}")
    model = pack(lsq(model, task, bits=bits, steps=2))
    form, kind = target(f"gguf:{name}")
    held = form.plan(checkpoint(model), kind)
    assert list(held.values()).count(name.upper()) == 7


def test_what_the_target_cannot_hold_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(fit, "_steps", None)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        lsq(tiny_llama(), lm(target="gguf:tq2_0"), bits=1.58)


@pytest.mark.parametrize("arguments", [{"bits": 0}, {"bits": 17}, {"bits": 2.5}, {"group": 7}, {"input_bits": 0}, {"steps": 0}, {"warmup": -1.0}])
def test_arguments_that_cannot_work(arguments):
    with pytest.raises(QatlasError):
        lsq(tiny_llama(), lm(), **{"steps": 1, **arguments})


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return lsq(tiny_llama(), task, bits=2, input_bits=8, distil=True, steps=4)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=2)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrong, words", [({"bits": 1}, "1.58 or of 2 to 8"), ({"bits": 9}, "bits=9"), ({"bits": 2.5}, "bits=2.5"),
                                          ({"input_bits": 1}, "input_bits=1"), ({"input_bits": 16, "static": True}, "2 to 8")])
def test_bits_outside_of_the_paper_are_refused(wrong, words):
    with pytest.raises(QuantError, match=words):
        lsq(tiny_llama(), lm(), steps=1, **wrong)
