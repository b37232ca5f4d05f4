"""Overcoming oscillations: dampening and freezing, exactly, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import Stop
from tiny import llama as tiny_llama
from tiny import task as lm
from torch import nn

from qatlas.core.error import QuantError, RunError
from qatlas.core.estimator import Clip, Ste
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.transform import Hadamard
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.places import at_edges
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, quantize
from qatlas.papers.lsq import lsq
from qatlas.papers.oscillations import inducing
from qatlas.papers.overcoming_oscillations import Dampen, Still, dampening, of_weight, overcoming_oscillations
from qatlas.train.fit import fit
from qatlas.train.labelled import Images
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.track import Track

OFF = {"threshold": 0.0}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def layer(quant, out=6, inputs=10):
    torch.manual_seed(0)
    return nn.Sequential(QLinear.of(nn.Linear(inputs, out, bias=False, dtype=torch.float64), Slots(quant)))


# ---- dampening -------------------------------------------------------------------------------------------------------------------------------------

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


def test_damping_rises_along_a_cosine():
    class At:
        progress, model = 0.5, layer(of_weight(3))

    assert float(Dampen(4.0).loss(At, torch.zeros(()), {})) == pytest.approx(2.0 * float(dampening(At.model)))


def test_damping_empties_the_edges():
    shares = [at_edges(overcoming_oscillations(tiny_llama(), lm(), strength=strength, lr=3e-3, steps=30, **OFF)) for strength in (0.0, 1.0)]
    assert shares[1] < shares[0] - 0.03


# ---- freezing --------------------------------------------------------------------------------------------------------------------------------------

def test_the_threshold_falls_along_a_cosine():
    assert [round(Still(0.1, 0.01).limit(p), 4) for p in (0, 0.5, 1)] == [0.1, 0.055, 0.01] and Still(0.0).limit(0.5) == 0


def frozen_run(steps=8):
    """A run in which much is frozen; what was frozen after each step, and the integers of all."""
    seen = []

    class Look(Tactic):
        def after(self, loop):
            gone = {name: state["frozen"].clone() for name, state in still._seen.items()}
            seen.append((gone, {name: one.quantize().codes for name, one in loop.layers()}, {n: s["held"].clone() for n, s in still._seen.items()}))

    still = Still(0.05, 0.05, momentum=0.2)
    model = quantize(tiny_llama(), [Rule("*proj", weight=of_weight(3))])
    fit(model, lm(), optimizer=AdamW(lr=5e-2, scale_share=0.05), steps=steps, tactics=[still, Look()])
    return model, still, seen


def test_a_frozen_weight_never_changes_its_integer_and_follows_its_step():
    model, still, seen = frozen_run()
    share = still.frozen()
    assert 0.01 < share < 1
    for (before, codes, held), (after, later, _) in itertools.pairwise(seen):
        for name in before:
            gone = before[name]
            assert not (gone & ~after[name]).any(), "frozen is for good"
            assert torch.equal(codes[name][gone], later[name][gone]) and torch.equal(codes[name][gone], held[name][gone])
    for name, one in quantized(model).items():
        gone = still._seen[name]["frozen"]
        assert torch.equal(one.weight[gone], one.hard()[gone])


def test_a_frozen_weight_gets_no_gradient():
    still = Still(0.05, 0.05)
    model = quantize(tiny_llama(), [Rule("*proj", weight=of_weight(3))])

    class Ice(Tactic):
        def before(self, loop):
            for state in still._seen.values():
                state["frozen"][0] = True

        def grads(self, loop):
            for _, one in loop.layers():
                assert not one.weight.grad[0].any() and one.weight.grad[1:].any()

    fit(model, lm(), steps=2, tactics=[still, Ice()])


@pytest.mark.parametrize("quant, more, words", [(Quant(Uniform(3), PerChannel(), AbsMax(), Ste()), {}, "measures its step anew"),
                                                (of_weight(3), {"transform": Hadamard()}, "transform or an adapter")])
def test_what_cannot_be_frozen_is_refused(quant, more, words):
    model = quantize(tiny_llama(), [Rule("*proj", weight=quant, **more)])
    with pytest.raises(RunError, match=words):
        fit(model, lm(), steps=1, tactics=[Still(0.1)])
    fit(model, lm(), steps=1, tactics=[Still(0.0)])


# ---- the paper -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1.58, 3])
def test_both_at_zero_it_is_lsq(bits):
    """With LSQ's own start."""
    plain = lsq(tiny_llama(), lm(), bits=bits, lr=1e-2, steps=4)
    assert same(plain, overcoming_oscillations(tiny_llama(), lm(), bits=bits, start="mean", strength=0.0, lr=1e-2, steps=4, **OFF))
    assert not same(plain, overcoming_oscillations(tiny_llama(), lm(), bits=bits, start="mse", lr=1e-2, steps=4, **OFF))


def test_a_watched_run_is_the_same_run():
    watch, other = Track(), lm()
    other.run.tactics = (watch,)
    plain, tracked = (overcoming_oscillations(tiny_llama(), task, steps=6, lr=3e-2, **OFF) for task in (lm(), other))
    assert same(plain, tracked) and watch.turning() > 0


def test_freezing_is_what_it_does_unless_told_otherwise():
    def one(**more):
        return overcoming_oscillations(tiny_llama(), lm(), steps=8, lr=3e-2, momentum=0.2, **more)

    assert not same(one(), one(**OFF)) and not same(one(), one(strength=1.0))


@pytest.mark.parametrize("more", [OFF, OFF | {"strength": 1.0}, {}, {"strength": 1.0}], ids=["plain", "dampen", "freeze", "both"])
def test_it_resumes_to_the_same_bits(more, tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return overcoming_oscillations(tiny_llama(), task, momentum=0.3, lr=3e-2, steps=6, **more)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=4)
    assert same(whole, one(tmp_path / "halted", resume=True))


@pytest.mark.parametrize("wrong, kind, words", [({"bits": 1}, QuantError, "2 to 8"), ({"strength": -1.0}, RunError, "0 or more"),
                                                ({"threshold_end": 0.0}, RunError, "stays above 0"), ({"threshold_end": 0.2}, RunError, "falls"),
                                                ({"threshold": -1.0}, RunError, "falls"), ({"start": "max"}, RunError, "mse or mean")])
def test_what_cannot_work_is_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        overcoming_oscillations(tiny_llama(), lm(), steps=1, **wrong)


def test_batch_norms_are_measured_anew_at_the_end(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (40, 4, 4, 3), dtype=np.uint8), y=np.arange(40) % 2)
    task = Images(str(tmp_path / "images.npz"), batch=8, run=Run(progress=False))
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).train()
    trained = overcoming_oscillations(model, task, reestimation=3, steps=2)
    assert int(trained[1].num_batches_tracked) == 3
