"""Oscillations: the exact checks of its sheet, freezing, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import QuantError, RunError
from qatlas.core.estimator import Clip, Ste
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.transform import Hadamard
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, quantize
from qatlas.papers.oscillations import Dampen, Track, at_edges, dampening, inducing, of_weight, oscillations, reestimate
from qatlas.train import data
from qatlas.train.fit import fit
from qatlas.train.labelled import Images
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling
from qatlas.train.teacher import full_precision

MODES = ("induce", "dampen", "freeze", "plain")


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def layer(quant, out=6, inputs=10):
    torch.manual_seed(0)
    return nn.Sequential(QLinear.of(nn.Linear(inputs, out, bias=False, dtype=torch.float64), Slots(quant)))


# ---- the two regularisers --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradient_of_r_points_from_the_level(bits):
    model = layer(of_weight("induce", bits, detach=True))
    w, q = model[0].weight, model[0].hard()
    inducing(model).backward()
    torch.testing.assert_close(w.grad, 2 * (q - w.detach()) / w.numel(), rtol=1e-12, atol=1e-15)
    assert not w.grad[(w.abs() == w.abs().max())].any(), "the largest weight lies on a level"


@pytest.mark.parametrize("bits", [2, 3])
def test_the_step_hears_r_unless_it_is_detached(bits):
    model = layer(of_weight("induce", bits))
    w = model[0].weight
    inducing(model).backward()
    top, q = 2 ** (bits - 1) - 1, model[0].hard()
    s, n = w.detach().abs().max() / top, w.numel()
    wanted, at = 2 * (q - w.detach()) / n, w.abs() == w.abs().max()
    u = w.detach() / s
    wanted[at] += (2 * q * (u.round() - u)).sum() / n * w.detach()[at].sign() / top
    torch.testing.assert_close(w.grad, wanted, rtol=1e-12, atol=1e-15)


def test_to_damp_is_to_induce_with_the_other_sign():
    """Where nothing is clipped, and lambda / n is the other's lambda."""
    quant = Quant(Uniform(3, narrow=True), PerTensor(), AbsMax(), Clip(margin=0.5))
    one, other = layer(quant), layer(quant)
    (3.0 * inducing(one)).backward()
    (3.0 / one[0].weight.numel() * dampening(other)).backward()
    torch.testing.assert_close(one[0].weight.grad, -other[0].weight.grad, rtol=1e-12, atol=1e-15)


def test_a_clipped_weight_is_not_damped():
    model = layer(Quant(Uniform(2), PerTensor(), Learned(AbsMax()), Ste())).float()
    with torch.no_grad():
        model[0].weight_quantizer.scale.fill_(0.1)
    w, q = model[0].weight, model[0].hard()
    dampening(model).backward()
    inside = (w >= -0.2) & (w <= 0.1)
    assert inside.any() and not inside.all()
    torch.testing.assert_close(w.grad, torch.where(inside, 2 * (w.detach() - q), 0.0))
    assert model[0].weight_quantizer.scale.grad is None


def test_one_weight_oscillates_and_full_precision_with_the_term_walks_the_same_way():
    """The toy of the paper: x = 1, y = 0.63, s = 0.5, rate 0.05: the optimum of the rounded model is between two levels."""
    quantizer = Quantizer(Quant(Uniform(8), PerTensor(), Learned(AbsMax()), Ste())).initialise(torch.tensor([63.5]))
    quantizer.double()
    assert float(quantizer.scale) == 0.5
    rounded, full = (torch.tensor([0.6], dtype=torch.float64, requires_grad=True) for _ in range(2))
    ways = []
    for _ in range(400):
        (0.5 * (quantizer(rounded) - 0.63).square().sum()).backward()
        (0.5 * (full - 0.63).square() + 0.5 * (quantizer(full).square() - full.square())).sum().backward()
        with torch.no_grad():
            for w in (rounded, full):
                torch.testing.assert_close(w.grad, (w - 0.63) + (quantizer.hard(w) - w), rtol=0, atol=1e-14)
            for w in (rounded, full):
                w -= 0.05 * w.grad
                w.grad = None
        ways.append((float(rounded), float(full)))
    late = [w for w, _ in ways[50:]]
    assert all(a == pytest.approx(b, abs=1e-12) for a, b in ways)
    assert 0.732 - 1e-3 <= min(late) < 0.75 < max(late) <= 0.7565 + 1e-3


# ---- tracking and freezing -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("integers, turns", [([0, 1, 0, 1, 0], [0, 0, 1, 1, 1]), ([0, 1, 2, 3, 3], [0, 0, 0, 0, 0]),
                                             ([5, 4, 4, 6, 6], [0, 0, 0, 1, 0])])
def test_a_switch_back_is_an_oscillation(integers, turns):
    codes = [torch.tensor([i], dtype=torch.uint8) for i in integers]
    track = Track(0.0, momentum=0.25)
    seen = {"codes": codes[0], "turn": torch.zeros(1, dtype=torch.int8), "often": torch.zeros(1), "mean": codes[0].float()}
    often, mean = 0.0, float(integers[0])
    for one, turned in zip(codes[1:], turns[1:], strict=True):
        track.follow(seen, one)
        often, mean = 0.75 * often + 0.25 * turned, 0.75 * mean + 0.25 * float(one)
        assert float(seen["often"]) == pytest.approx(often) and float(seen["mean"]) == pytest.approx(mean)


def test_the_threshold_falls_along_a_cosine():
    assert [round(Track(0.1, 0.01).limit(p), 4) for p in (0, 0.5, 1)] == [0.1, 0.055, 0.01] and Track(0.0).limit(0.5) == 0


def frozen_run(steps=8):
    """A run in which much is frozen; what was frozen after each step, and the integers of all."""
    seen = []

    class Look(Tactic):
        def after(self, loop):
            gone = {name: state["frozen"].clone() for name, state in track._seen.items()}
            seen.append((gone, {name: one.quantize().codes for name, one in loop.layers()}, {n: s["held"].clone() for n, s in track._seen.items()}))

    track = Track(0.05, 0.05, momentum=0.2)
    model = quantize(tiny_llama(), [Rule("*proj", weight=of_weight("freeze", 3))])
    fit(model, lm(), optimizer=AdamW(lr=5e-2, scale_share=0.05), steps=steps, tactics=[track, Look()])
    return model, track, seen


def test_a_frozen_weight_never_changes_its_integer_and_follows_its_step():
    model, track, seen = frozen_run()
    share = track.shares()["frozen"]
    assert 0.01 < share < 1
    for (before, codes, held), (after, later, _) in itertools.pairwise(seen):
        for name in before:
            gone = before[name]
            assert not (gone & ~after[name]).any(), "frozen is for good"
            assert torch.equal(codes[name][gone], later[name][gone]) and torch.equal(codes[name][gone], held[name][gone])
    for name, one in quantized(model).items():
        gone = track._seen[name]["frozen"]
        assert torch.equal(one.weight[gone], one.hard()[gone])


def test_a_frozen_weight_gets_no_gradient():
    track = Track(0.05, 0.05)
    model = quantize(tiny_llama(), [Rule("*proj", weight=of_weight("freeze", 3))])

    class Ice(Tactic):
        def before(self, loop):
            for state in track._seen.values():
                state["frozen"][0] = True

        def grads(self, loop):
            for _, one in loop.layers():
                assert not one.weight.grad[0].any() and one.weight.grad[1:].any()

    fit(model, lm(), steps=2, tactics=[track, Ice()])


def test_tracking_alone_watches_and_moves_nothing():
    watch, other = Track(0.0), lm()
    other.run.tactics = (watch,)
    plain, tracked = (oscillations(tiny_llama(), task, mode="plain", steps=6, lr=3e-2) for task in (lm(), other))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), tracked.state_dict().values(), strict=True))
    assert watch.shares()["frozen"] == 0 < watch.shares()["oscillating"]


@pytest.mark.parametrize("quant, more, words", [(Quant(Uniform(3), PerChannel(), AbsMax(), Ste()), {}, "measures its step anew"),
                                                (of_weight("freeze", 3), {"transform": Hadamard()}, "transform or an adapter")])
def test_what_cannot_be_frozen_is_refused(quant, more, words):
    model = quantize(tiny_llama(), [Rule("*proj", weight=quant, **more)])
    with pytest.raises(RunError, match=words):
        fit(model, lm(), steps=1, tactics=[Track(0.1)])
    fit(model, lm(), steps=1, tactics=[Track(0.0)])


# ---- the paper -------------------------------------------------------------------------------------------------------------------------------------

def test_lambda_zero_is_training_in_full_precision():
    other = tiny_llama()
    fit(other, lm(), optimizer=AdamW(lr=1e-3, scale_share=0.01), schedule=cosine(0.05), steps=4)
    model = oscillations(tiny_llama(), lm(), strength=0.0, lr=1e-3, steps=4)
    with full_precision(model):
        found = dict(model.named_parameters())
        assert all(torch.equal(p, found[name]) for name, p in other.named_parameters())
    damped = oscillations(tiny_llama(), lm(), mode="dampen", strength=0.0, lr=1e-3, steps=4)
    plain = oscillations(tiny_llama(), lm(), mode="plain", lr=1e-3, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(damped.state_dict().values(), plain.state_dict().values(), strict=True))


def test_inducing_gathers_weights_at_the_edges_and_damping_empties_them():
    shares = {strength: at_edges(oscillations(tiny_llama(), lm(), bits=3, strength=strength, lr=3e-3, steps=30)) for strength in (0.0, 30.0)}
    assert shares[30.0] > shares[0.0] + 0.1
    damped = {mode: at_edges(oscillations(tiny_llama(), lm(), mode=mode, lr=3e-3, steps=30, **more))
              for mode, more in (("plain", {}), ("dampen", {"strength": 1.0}))}
    assert damped["dampen"] < damped["plain"] - 0.03


def test_it_computes_rounded_once_training_is_over():
    model = oscillations(tiny_llama(), lm(), bits=2, steps=2)
    ids = torch.arange(24).view(2, 12) % 32
    rounded = model(ids).logits
    assert all(len(one.quantize().codes.unique()) <= 3 and torch.equal(one.computed(), one.hard()) for one in quantized(model).values())
    with full_precision(model):
        assert not torch.equal(model(ids).logits, rounded)


@pytest.mark.parametrize("mode", MODES)
def test_it_resumes_to_the_same_bits(mode, tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return oscillations(tiny_llama(), task, mode=mode, momentum=0.3, lr=3e-2, steps=6)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=4)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrong, kind, words", [({"mode": "swing"}, RunError, "induce, dampen, freeze"), ({"bits": 1}, QuantError, "2 to 8"),
                                                ({"mode": "plain", "strength": 1.0}, RunError, "of induce and dampen only"),
                                                ({"learned": True}, RunError, "nothing would teach"),
                                                ({"mode": "freeze", "learned": False}, RunError, "stay where they are"),
                                                ({"strength": -1.0}, RunError, "0 or more"),
                                                ({"mode": "freeze", "threshold": 0.0}, RunError, "nothing would freeze")])
def test_what_cannot_work_is_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        oscillations(tiny_llama(), lm(), steps=1, **wrong)


def test_batch_norms_are_measured_anew(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (40, 4, 4, 3), dtype=np.uint8), y=np.arange(40) % 2)
    task = Images(str(tmp_path / "images.npz"), batch=8, run=Run(progress=False))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).train()
    assert reestimate(model, task, 3) == 1 and all(m.training for m in model.modules()) and model[1].momentum == 0.1
    with torch.no_grad():
        each = [model[0](task.batch(step)["pixel_values"]).transpose(0, 1).flatten(1) for step in range(3)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(1) for x in each]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var(1) for x in each]).mean(0))
    kept = model[1].running_mean.clone()
    assert reestimate(model, task, 0) == 0 and torch.equal(model[1].running_mean, kept)
    trained = oscillations(model, task, mode="plain", reestimation=2, steps=2)
    assert int(trained[1].num_batches_tracked) == 2


def test_damping_rises_along_a_cosine():
    class At:
        progress, model = 0.5, layer(of_weight("induce", 3))

    assert float(Dampen(4.0).loss(At, torch.zeros(()), {})) == pytest.approx(2.0 * float(dampening(At.model)))
