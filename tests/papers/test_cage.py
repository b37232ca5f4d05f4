"""CAGE: the exact checks of its sheet, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import pytest
import torch
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import FormatError, QuantError, RunError
from qatlas.core.estimator import Clip, Ste
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.transform import Hadamard
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, quantize
from qatlas.papers.cage import Cage, cage, left
from qatlas.papers.quest import gaussian, quest
from qatlas.train import data
from qatlas.train.fit import fit
from qatlas.train.optim import SGD, AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import constant, cosine
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

FIXED = Quant(Uniform(6), PerTensor(), Learned(AbsMax()), Ste())


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Way(Tactic):
    """How far each weight is from its grid, after each step."""

    def __init__(self):
        self._far = []

    def after(self, loop):
        self._far.append(torch.cat([(layer.weight - layer.hard()).detach().flatten() for _, layer in loop.layers()]))


def drawn(tactics, optimizer, quant=FIXED, steps=6, slope=0.0, frozen_scale=True, transform=None):
    """A run whose loss is slope times the sum of the weights: its gradient is known."""
    model = quantize(tiny_llama(), [Rule("*proj", weight=quant, transform=transform)])
    weights = [name for name, _ in model.named_parameters() if not (frozen_scale and name.endswith(".scale"))]

    def loss(model, batch):
        return sum(slope * layer.weight.sum() + 0 * layer.weight.square().sum() for layer in quantized(model).values())

    fit(model, lm(), train=weights, optimizer=optimizer, steps=steps, loss=loss, tactics=tactics, clip=None)
    return model


# ---- the pull --------------------------------------------------------------------------------------------------------------------------------------

def test_the_schedule():
    assert [Cage(10, 0.8).amount(t - 1, 100) for t in (1, 80, 90, 100)] == [0, 0, 5, 10]
    assert [Cage(10, 0.8, "constant").amount(t - 1, 100) for t in (80, 81, 100)] == [0, 10, 10]
    assert [Cage(10, 0.0).amount(t - 1, 4) for t in (1, 2, 3, 4)] == [2.5, 5, 7.5, 10]


@pytest.mark.parametrize("transform", [None, Hadamard(seed=1)])
def test_without_a_gradient_the_way_to_the_grid_shrinks_by_the_same_factor(transform):
    """c = lr lambda = 0.3; the loss is silent, there is no decay, the step stays."""
    way = Way()
    drawn([Cage(3.0, 0.0, "constant"), way], SGD(0.1, momentum=0.0), transform=transform)
    for before, after in zip(way._far, way._far[1:], strict=False):
        torch.testing.assert_close(after, 0.7 * before, rtol=1e-3, atol=2e-7)
    assert way._far[0].abs().max() > 1e-4
    assert left(Cage(3.0, 0.0, "constant"), 0.1, constant(), 6) == pytest.approx(0.7**6)


@pytest.mark.parametrize("coupled, share", [(True, 1.0), (False, 0.6)])
def test_sgd_ends_where_the_loss_and_the_pull_hold_each_other(coupled, share):
    """x - Q(x) = -g / lambda, as long as that is less than half a step; behind the step, 1 - lr lambda of it."""
    quant = Quant(Uniform(2), PerTensor(), Learned(AbsMax()), Ste())
    model = drawn([Cage(2.0, 0.0, "constant", coupled)], SGD(0.2, momentum=0.0), quant=quant, slope=0.002, steps=50)
    inside = [(layer.weight - layer.hard())[(layer.weight / layer.weight_quantizer.scale).abs() < 0.4] for layer in quantized(model).values()]
    torch.testing.assert_close(torch.cat(inside), torch.full_like(torch.cat(inside), -0.001 * share), rtol=0, atol=1e-6)


def test_coupled_and_decoupled_are_one_under_sgd_up_to_where_it_is_taken():
    """In one step from the same point: the coupled takes x - Q(x) from before the step, with no gradient they are equal."""
    one, other = (drawn([Cage(3.0, 0.0, "constant", coupled)], SGD(0.1, momentum=0.0)) for coupled in (False, True))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_under_adam_the_coupled_pull_is_divided_by_its_own_size():
    """Adam's first step has the length of its rate whatever the pull is; the decoupled one keeps its size."""
    start = drawn([], SGD(0.0, momentum=0.0), steps=1)
    for coupled, wanted in ((True, 1e-4), (False, None)):
        model = drawn([Cage(30.0, 0.0, "constant", coupled)], AdamW(lr=1e-4), steps=1)
        for a, b in zip(quantized(start).values(), quantized(model).values(), strict=True):
            far = a.weight - a.hard()
            moved, clear = a.weight - b.weight, far.abs() > 1e-5
            if coupled:
                torch.testing.assert_close(moved[clear], wanted * far[clear].sign(), rtol=0.02, atol=1e-7)
            else:
                torch.testing.assert_close(moved, 3e-3 * far, rtol=0.01, atol=1e-7)


def test_what_has_no_quantizer_or_is_frozen_is_left_alone():
    start, model = tiny_llama(), drawn([Cage(3.0, 0.0, "constant")], SGD(0.1, momentum=0.0))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(start.get_parameter(name), model.get_parameter(name))
    frozen = quantize(tiny_llama(), [Rule("*proj", weight=FIXED)])
    before = frozen.model.layers[0].mlp.up_proj.weight.detach().clone()
    fit(frozen, lm(), train="*norm*", steps=2, tactics=[Cage(3.0, 0.0)])
    assert torch.equal(frozen.model.layers[0].mlp.up_proj.weight, before)


def test_the_values_are_those_of_the_weight_behind_the_step_in_its_own_space():
    seen = []

    class Look(Tactic):
        def after(self, loop):
            seen.extend((layer.weight.detach().clone(), layer.hard(), loop.lr(layer.weight)) for _, layer in loop.layers())

    model = quantize(tiny_llama(), [Rule("*proj", weight=gaussian(3, PerChannel()), transform=Hadamard(most=128))])
    fit(model, lm(), optimizer=AdamW(lr=1e-2, weight_decay=0.1), steps=1, tactics=[Look(), Cage(20.0, 0.0, "constant")])
    for (w, hard, lr), layer in zip(seen, quantized(model).values(), strict=True):
        torch.testing.assert_close(layer.weight.detach(), w - lr * 20.0 * (w - hard), rtol=1e-6, atol=1e-8)
        assert torch.allclose(layer.transform.back(layer.quantize().dequantize()), layer.hard())


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2, weight_decay=0.1), SGD(0.05)])
@pytest.mark.parametrize("tactic", [Cage(0.0, 0.0), Cage(0.0, 0.0, coupled=True), Cage(9.0, 0.9), Cage(9.0, 0.9, coupled=True)])
def test_strength_zero_and_silence_are_the_optimizer_alone(optimizer, tactic):
    ends = []
    for tactics in ([], [tactic]):
        model = quantize(tiny_llama(), "w3a8")
        stay = Stay()
        fit(model, lm(), optimizer=optimizer, steps=4, tactics=[*tactics, stay])
        ends.append((model, stay._third))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert same(ends[0][0], ends[1][0]) is (tactic.strength == 0)


class Stay(Tactic):
    """Remember the weights after the third step: the fourth is no longer silent."""

    def after(self, loop):
        if loop.step == 2:
            self._third = [p.detach().clone() for p in loop.model.parameters()]


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"silence": 1.0}, {"silence": -0.1}, {"shape": "cosine"}])
def test_what_cannot_work_is_refused(wrong):
    with pytest.raises(RunError, match="strength is 0 or more"):
        Cage(**wrong)


def test_a_pull_beyond_the_grid_is_refused():
    with pytest.raises(RunError, match="in one step; take a strength well below 10"):
        drawn([Cage(10.0, 0.0, "constant")], SGD(0.1, momentum=0.0))


# ---- the paper -------------------------------------------------------------------------------------------------------------------------------------

def test_strength_zero_is_quest_with_its_clip():
    model = cage(tiny_llama(), lm(), bits=3, input_bits=3, strength=0.0, scratch=True, steps=3)
    assert same(model, quest(tiny_llama(), lm(), bits=3, input_bits=3, clip=1.0, scratch=True, steps=3))
    pulled = cage(tiny_llama(), lm(), bits=3, input_bits=3, strength=100.0, silence=0.3, scratch=True, steps=3)
    assert not same(model, pulled)


@pytest.mark.parametrize("base, bits", [("quest", 2), ("quest", 3), ("lsq", 2)])
def test_it_ends_nearer_to_the_grid(base, bits):
    far = {}
    for strength in (0.0, 300.0):
        model = cage(tiny_llama(), lm(), bits=bits, base=base, strength=strength, silence=0.3, lr=1e-3, weight_decay=0.0, steps=16)
        far[strength] = sum(float((layer.weight - layer.hard()).norm()) for layer in quantized(model).values())
    assert far[300.0] < 0.7 * far[0.0]


def test_both_bases_are_what_they_say():
    learned = cage(tiny_llama(), lm(), base="lsq", bits=4, input_bits=None, hadamard=None, steps=1)
    assert all(isinstance(layer.weight_quantizer.quant.scale, Learned) and layer.transform is None for layer in quantized(learned).values())
    assert all(layer.weight_quantizer.quant.estimator == Clip(at=7.5) for layer in quantized(cage(tiny_llama(), lm(), steps=1)).values())


@pytest.mark.parametrize("wrong, kind, words", [({"base": "pact"}, RunError, "quest or lsq"), ({"bits": 9}, QuantError, "not 9"),
                                                ({"base": "lsq", "bits": 1}, QuantError, "1.58 or of 2 to 8"), ({"silence": 1.0}, RunError, "part")])
def test_arguments_that_cannot_work(wrong, kind, words):
    with pytest.raises(kind, match=words):
        cage(tiny_llama(), lm(), steps=1, **wrong)


def test_a_rotation_is_refused_by_a_target():
    with pytest.raises(FormatError, match="Hadamard"):
        cage(tiny_llama(), lm(target="gguf:q8_0"), bits=3, steps=1)


@pytest.mark.parametrize("coupled", [False, True])
def test_it_resumes_to_the_same_bits(coupled, tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return cage(tiny_llama(), task, bits=2, strength=100.0, silence=0.4, coupled=coupled, steps=5)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=3)
    assert same(whole, one(tmp_path / "halted", resume=True))


def test_what_is_left_of_the_way():
    """The authors' 30 M run: 11,400 steps, rate 1.2e-3: a fifth is left. A thousand steps leave nearly all."""
    assert left(Cage(10, 0.8), 1.2e-3, cosine(0.1, end=0.1), 11400) == pytest.approx(0.20, abs=0.03)
    assert left(Cage(10, 0.8), 1e-3, cosine(0.1, end=0.1), 1000) > 0.85
    assert QLinear.of(nn.Linear(4, 4), Slots(FIXED)).hard().shape == (4, 4)
