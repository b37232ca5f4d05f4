"""Quantization constraints: the exact checks of its sheet, and what the paper's function promises on a Llama and a small convolutional net."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import QuantError, RunError
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.twins import Twin, pair, part
from qatlas.papers.quantization_constraints import (
    Bounded,
    Duals,
    Lagrangian,
    apart,
    deaf,
    high,
    of_weight,
    quantization_constraints,
)
from qatlas.train import data
from qatlas.train.fit import fit
from qatlas.train.labelled import Images
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (40, 6, 6, 3), dtype=np.uint8), y=np.arange(40) % 2)
    return Images(str(tmp_path / "images.npz"), batch=8, extra_rules=keep_full("6"), run=Run(progress=False))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def low_and_high(images, **more):
    """A convolutional net of 2 bits with paired norms, and its Lagrangian."""
    model = quantize(convolutional(), [*keep_full("6"), Rule("*", weight=of_weight("lsq", 2), adapter=more.pop("adapter", None))])
    pair(model)
    return model.train(), Lagrangian(images, model, **more)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- DoReFa ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_has_even_levels_up_to_the_mean(bits):
    layer = QLinear.of(nn.Linear(40, 30, dtype=torch.float64), Slots(of_weight("dorefa", bits), adapter=Bounded()))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(30, 40, dtype=torch.float64))
    w, e, n = layer.weight.detach(), layer.weight.detach().abs().mean(), 2**bits - 1
    t = w.tanh() / (2 * w.tanh().abs().max()) + 0.5
    torch.testing.assert_close(layer.hard(), e * (2 * (t * n).round() / n - 1), rtol=1e-12, atol=1e-14)
    values = layer.hard()
    assert len(layer.quantize().codes.unique()) == 2**bits and float(values.abs().max()) == pytest.approx(float(e))
    with torch.no_grad():
        layer.weight.neg_()
    torch.testing.assert_close(layer.hard(), -values)
    before, codes = layer.hard(), layer.quantize().codes
    layer.merge()
    assert torch.equal(layer.hard(), before) and torch.equal(layer.quantize().codes, codes) and layer.adapter is None


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(Bounded().build(torch.zeros(2, 2)).inside(torch.zeros(2, 2)), torch.zeros(2, 2))


# ---- constraints -----------------------------------------------------------------------------------------------------------------------------------

def test_a_layer_on_its_grid_breaks_no_constraint_whatever_the_others_do(images):
    model, lagrangian = low_and_high(images, eps_layer=0.01)
    with torch.no_grad():
        model[3].weight.copy_(model[3].hard())
        with high(model):
            logits = images.logits(model, images.batch(0))
        slacks = lagrangian.slacks(model, images.batch(0), logits)
    assert lagrangian.sites == ["0", "3"] and float(slacks[1]) == pytest.approx(-0.01, abs=1e-7) and float(slacks[0]) > 0


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_layers_error_is_that_of_its_weight_on_the_low_bit_input(kind):
    torch.manual_seed(0)
    plain, x = (nn.Linear(6, 4), torch.randn(5, 6)) if kind == "linear" else (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5))
    model = quantize(nn.Sequential(plain, nn.Flatten()), [Rule("0", weight=of_weight("lsq", 2))])
    layer, product = model[0], F.linear if kind == "linear" else F.conv2d
    d = apart(layer, x, None)
    d.backward()
    w = layer.weight.detach().clone().requires_grad_()
    wanted = (product(x, w) - product(x, layer.hard())).square().mean()
    wanted.backward()
    torch.testing.assert_close(d, wanted)
    torch.testing.assert_close(layer.weight.grad, w.grad)
    assert not layer.bias.grad.abs().gt(1e-7).any() and layer.weight_quantizer.scale.grad is None
    y = torch.randn(7)
    torch.testing.assert_close(apart(layer, x, y), d / y.square().mean())


def test_the_shared_weights_hear_full_precision_only_and_the_low_norms_the_output(images):
    model, lagrangian = low_and_high(images, layerwise=False)
    batch = images.batch(0)
    lagrangian(model, batch).backward()
    got = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    other, _ = low_and_high(images, layerwise=False)
    with torch.no_grad():
        low = images.logits(other, batch)
    with high(other):
        logits = images.logits(other, batch)
    (F.cross_entropy(logits, batch["labels"]) + images.divergence(low, logits)).backward()
    shared = {name for name, p in other.named_parameters() if p.grad is not None}
    for name in shared:
        torch.testing.assert_close(got[name], other.get_parameter(name).grad, rtol=1e-5, atol=1e-7)
    assert got["1.low.weight"].abs().sum() > 0 and got["0.weight_quantizer.scale"].abs().sum() > 0
    assert {"0.weight", "1.high.weight", "6.weight"} <= shared and "1.low.weight" not in shared
    assert all(p.requires_grad for p in model.parameters())
    both, through = low_and_high(images, layerwise=False, both=True)
    through(both, batch).backward()
    assert not torch.allclose(both[0].weight.grad, got["0.weight"])


def test_lambda_of_the_output_alone_is_self_distillation(images):
    model, lagrangian = low_and_high(images, eps_out=0.25)
    assert lagrangian.duals.tolist() == [0, 0, 1]
    batch, twin = images.batch(0), copy.deepcopy(model)
    with high(twin):
        logits = images.logits(twin, batch)
    wanted = F.cross_entropy(logits, batch["labels"]) + F.kl_div(images.logits(twin, batch).log_softmax(1), logits.softmax(1), reduction="batchmean")
    torch.testing.assert_close(lagrangian(model, batch), wanted - 0.25, rtol=1e-5, atol=1e-6)
    crossed = Lagrangian(images, model, eps_out=0.25, cross=True)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(crossed(model, batch), wanted - 0.25 + entropy, rtol=1e-5, atol=1e-6)


def test_each_precision_has_norms_of_its_own(images):
    model, _ = low_and_high(images)
    x = images.batch(0)["pixel_values"]
    before = model[1].high.running_mean.clone()
    model(x)
    assert torch.equal(model[1].high.running_mean, before) and not torch.equal(model[1].low.running_mean, before)
    with high(model):
        model(x)
    assert not torch.equal(model[1].high.running_mean, before) and model[1].at == "low"
    low = model[1].low
    part(model)
    assert model[1] is low and not any(isinstance(m, Twin) for m in model.modules())


def test_what_is_deaf_hears_again():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    with deaf(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}


# ---- duals -----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps, multiplier, place", [(0.04, 0.5, 1.8), (0.01, 2.0, 1.9)])
def test_the_duals_climb_to_the_multiplier_and_it_is_the_price_of_the_constraint(eps, multiplier, place):
    """min (w - 1.7)^2 such that (w - 2)^2 <= eps."""
    w = lambda dual: (1.7 + 2 * dual) / (1 + dual)                                            # the primal optimum  # noqa: E731
    toy = SimpleNamespace(duals=torch.zeros(1))
    toy.slacks = lambda model, batch, logits: (w(toy.duals) - 2).square() - eps
    task = SimpleNamespace(batch=lambda step: {}, logits=lambda model, batch: None)
    loop, duals = SimpleNamespace(step=0, model=nn.Linear(1, 1), task=task), Duals(10.0, 1, 1, toy)
    for _ in range(3000):
        duals.after(loop)
        assert float(toy.duals) >= 0
    assert float(toy.duals) == pytest.approx(multiplier, rel=1e-3) and float(w(toy.duals)) == pytest.approx(place, abs=1e-3)
    value = lambda e: (0.3 - e**0.5) ** 2                                                     # noqa: E731
    assert (value(eps + 1e-6) - value(eps - 1e-6)) / 2e-6 == pytest.approx(-multiplier, rel=1e-3)
    toy.slacks = lambda model, batch, logits: torch.tensor([-0.1])                            # met: the price falls to nothing, and not below
    for _ in range(60):
        duals.after(loop)
    assert float(toy.duals) == 0


def test_the_duals_of_a_run_rise_where_a_constraint_is_broken(images):
    model = quantization_constraints(convolutional(), images, bits=2, eps_layer=0.0, eps_out=100.0, dual_lr=0.1, duals=4, steps=4)
    assert list(model.qatlas_duals) == ["0", "3", "output"]
    assert min(model.qatlas_duals["0"], model.qatlas_duals["3"]) > 0 == model.qatlas_duals["output"]


# ---- the paper -------------------------------------------------------------------------------------------------------------------------------------

def test_without_constraints_full_precision_trains_as_ever():
    """All lambdas 0: the weights go the way of plain training, bit for bit."""
    class Silent(Lagrangian):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self.duals = torch.zeros_like(self.duals)

    plain, model = tiny_llama(), quantize(tiny_llama(), [Rule("*proj", weight=of_weight("lsq", 2))])
    names = [name for name, _ in plain.named_parameters()]
    for one, loss in ((plain, None), (model, Silent(lm(), model))):
        fit(one, lm(), train=names, optimizer=AdamW(lr=1e-3), steps=3, loss=loss)
    assert all(torch.equal(plain.get_parameter(name), model.get_parameter(name)) for name in names)


def test_the_control_is_straight_through_training_of_the_same_numbers():
    model, plain = quantization_constraints(tiny_llama(), lm(), constrained=False, bits=3, steps=3), tiny_llama()
    quantize(plain, [*keep_full("lm_head", "model.embed_tokens"), Rule("*", weight=of_weight("lsq", 3))])
    fit(plain, lm(), optimizer=AdamW(lr=1e-3, scale_share=0.01), schedule=cosine(0.05), steps=3)
    assert same(model, plain) and model.qatlas_duals == {}


@pytest.mark.parametrize("more", [{}, {"base": "dorefa", "bits": 1}, {"layerwise": False, "cross": True}, {"both": True, "relative": False}])
def test_it_gives_the_low_bit_network(images, more):
    model = quantization_constraints(convolutional(), images, **{"bits": 2, "input_bits": 4, "static": True, "steps": 3, **more})
    assert type(model[1]) is nn.BatchNorm2d and all(layer.adapter is None for layer in quantized(model).values())
    assert all(p.isfinite().all() for p in model.parameters()) and not model.training
    bits = more.get("bits", 2)
    assert all(len(layer.quantize().codes.unique()) <= 2**bits for layer in quantized(model).values())


def test_the_full_precision_network_can_be_judged_while_it_runs(images):
    seen = []

    class Look(Tactic):
        def after(self, loop):
            with high(loop.model):
                seen.append(images.loss(loop.model, images.batch(0)).item())

    images.run.tactics = (Look(),)
    quantization_constraints(convolutional(), images, steps=12, lr=1e-2)
    assert len(seen) == 12 and seen[-1] < seen[0]


@pytest.mark.parametrize("wrong, kind, words", [({"bits": 1}, QuantError, "2 to 8"), ({"base": "dorefa", "bits": 9}, QuantError, "1 to 8"),
                                                ({"base": "pact"}, RunError, "lsq and dorefa"), ({"eps_out": -1.0}, RunError, "0 or more"),
                                                ({"duals": 0}, RunError, "at least 1")])
def test_what_cannot_work_is_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        quantization_constraints(tiny_llama(), lm(), steps=1, **wrong)


def test_several_processes_and_checkpointing_are_refused():
    with pytest.raises(RunError, match="run in one process"):
        Duals(of=SimpleNamespace()).start(SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), model=nn.Linear(1, 1)))
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(RunError, match="gradient_checkpointing_disable"):
        quantization_constraints(model, lm(), steps=1)


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return quantization_constraints(tiny_llama(dropout=0.1), task, base="dorefa", duals=6, dual_lr=1.0, steps=6)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=3)
    again = one(tmp_path / "halted", resume=True)
    assert same(whole, again) and whole.qatlas_duals == again.qatlas_duals
    assert one(tmp_path / "whole", resume=True).qatlas_duals == whole.qatlas_duals
