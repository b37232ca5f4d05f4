"""Tactics: strength zero is bit-identical (law 5); passes; what a tactic sees."""

import importlib
import pkgutil

import pytest
import torch
from tiny import llama, quantized, task

import qatlas.papers
import qatlas.record
import qatlas.train
from qatlas.core.error import RunError
from qatlas.train.fit import fit
from qatlas.train.optim import SGD, AdamW
from qatlas.train.tactic import Freeze, NoDecay, Pass, Ramp, Tactic


def every(kind):
    """All subclasses in qatlas.train and the papers, found by listing."""
    for package in (qatlas.train, qatlas.papers):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    found, left = [], [kind]
    while left:
        new = left.pop().__subclasses__()
        found, left = found + new, left + new
    return sorted((c for c in set(found) if c.__module__.startswith("qatlas.")), key=lambda c: c.__name__)


def run(tactics=(), scheme="w2", **more):
    model = quantized(llama(dropout=0.1), scheme) if scheme else llama(dropout=0.1)
    history = fit(model, task(), steps=5, optimizer=more.pop("optimizer", AdamW(1e-2)), tactics=tactics, **more)
    return model.state_dict(), history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0].values(), b[0].values(), strict=True)) and a[1].loss == b[1].loss


@pytest.mark.parametrize("kind", every(Tactic), ids=lambda kind: kind.__name__)
def test_strength_zero_is_bit_identical(kind):
    assert same(run(), run([kind.idle()]))


def test_the_empty_tactic_and_one_plain_pass_are_bit_identical():
    class One(Tactic):
        def passes(self, loop):
            return [Pass()]

    assert same(run(), run([Tactic()])) and same(run(), run([One()]))


def test_freeze_holds_the_scales_for_its_part():
    class Look(Tactic):
        def after(self, loop):
            seen.append(torch.cat([layer.weight_quantizer.scale.detach().clone() for _, layer in loop.layers()]))

    seen = []
    run([Freeze(0.5), Look()])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("over, steps, wanted", [(0.0, 3, [1, 1, 1]), (0.5, 4, [1 / 3, 2 / 3, 1, 1]), (1.0, 3, [1 / 3, 2 / 3, 1]), (1.0, 1, [1]),
                                                 (0.01, 2, [0.5, 1])])
def test_ramp_rises_in_equal_amounts_and_ends_at_one(over, steps, wanted):
    assert [Ramp(over).blend(step, steps) for step in range(steps)] == pytest.approx(wanted)


@pytest.mark.parametrize("scheme, keep", [("w2a8", "each"), ("w2a8", "buffer"), ("w1.58a8", "buffer"), ("w1.58a8", "recompute")])
def test_ramp_mixes_however_the_weight_is_kept(scheme, keep):
    plain, losses, states = run(scheme=scheme), {}, {}
    for how in ("each", keep):
        model = quantized(llama(dropout=0.1), scheme, how)
        losses[how] = fit(model, task(), steps=5, optimizer=AdamW(1e-2), tactics=[Ramp(1.0)]).loss
        states[how] = model.state_dict()
    assert losses["each"] == losses[keep] and all(torch.equal(a, b) for a, b in zip(states["each"].values(), states[keep].values(), strict=True))
    assert losses[keep][0] != plain[1].loss[0]


def test_ramp_reaches_every_quantizer_and_judges_none_of_the_mixture():
    class Look(Tactic):
        def after(self, loop):
            seen.append({module.blend for module in loop.model.modules() if hasattr(module, "blend")})
            layer = next(loop.layers())[1].eval()
            assert torch.equal(layer.computed(), layer.quantize().dequantize())
            layer.train()
            assert torch.equal(layer.computed(), layer.quantize().dequantize()) is (loop.step == 4)

    seen = []
    run([Ramp(1.0), Look()], "w2a8")
    assert seen == [{i / 5} for i in range(1, 6)]


def test_no_decay_ends_the_decay_and_nothing_else():
    class Look(Tactic):
        def after(self, loop):
            seen.append([group["weight_decay"] for group in loop.optimizer.param_groups])

    seen = []
    ends, _ = run([NoDecay(0.5), Look()], optimizer=AdamW(1e-2, weight_decay=0.3))
    assert seen == 2 * [[0.3, 0.0, 0.0]] + 3 * [[0.0, 0.0, 0.0]]
    whole, _ = run(optimizer=AdamW(1e-2, weight_decay=0.3))
    assert float(ends["model.layers.0.mlp.up_proj.weight"].norm()) > float(whole["model.layers.0.mlp.up_proj.weight"].norm())


@pytest.mark.parametrize("make", [lambda: Ramp(1.1), lambda: Ramp(-0.1), lambda: NoDecay(2.0)])
def test_parts_of_a_run_lie_in_it(make):
    with pytest.raises(RunError, match="from 0 to 1"):
        make()


class Sam(Tactic):
    """Climb by `strength` along the gradient, take the gradient there, step from where one was."""

    def __init__(self, strength=0.05):
        self.strength, self._moved = strength, {}

    def passes(self, loop):
        return [Pass(steps=()), Pass(enter=self.climb)]

    @torch.no_grad()
    def climb(self, loop):
        self._moved = {p: self.strength * p.grad for p in loop.names if p.grad is not None}
        self._start = {p: p.clone() for p in self._moved}
        for p, move in self._moved.items():
            p.add_(move)

    @torch.no_grad()
    def grads(self, loop):
        if loop.turn == 1:
            for p, start in self._start.items():
                p.copy_(start)


def test_two_passes_make_sam():
    model, subject = llama().train(), task()
    batch = subject.batch(0)
    params = dict(model.named_parameters())
    first = torch.autograd.grad(subject.loss(model, batch), params.values())
    start = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        for p, g in zip(params.values(), first, strict=True):
            p.add_(0.05 * g)
    second = torch.autograd.grad(subject.loss(model, batch), params.values())
    other = llama()
    fit(other, subject, steps=1, optimizer=SGD(0.1, momentum=0.0), tactics=[Sam()], clip=None)
    for (name, p), g in zip(other.named_parameters(), second, strict=True):
        torch.testing.assert_close(p.detach(), start[name] - 0.1 * g, atol=1e-6, rtol=1e-5)


def test_each_pass_steps_its_own_groups():
    class Turns(Tactic):
        def passes(self, loop):
            return [Pass(steps=("weights",)), Pass(steps=("scales",), loss=lambda model, batch: 2 * loop.task.loss(model, batch))]

        def grads(self, loop):
            turns.append((loop.step, loop.turn))

    turns = []
    state, _ = run([Turns()])
    start = quantized(llama(dropout=0.1), "w2").state_dict()
    moved = {name for name in state if not torch.equal(state[name], start[name])}
    assert turns == [(step, turn) for step in range(5) for turn in (0, 1)]
    assert any(name.endswith(".scale") for name in moved) and any("proj.weight" in name for name in moved)
    assert not any("norm" in name for name in moved)


def test_two_tactics_with_passes_are_refused():
    with pytest.raises(RunError, match="only one can"):
        run([Sam(), Sam()])


def test_what_a_tactic_sees():
    class Look(Tactic):
        def start(self, loop):
            calls.append(("start", len(loop.names)))

        def before(self, loop):
            calls.append(("before", round(loop.progress, 3)))

        def loss(self, loop, loss, batch):
            calls.append(("loss", len(batch["labels"])))
            return loss

        def after(self, loop):
            found = list(loop.quantized())
            calls.append(("after", len(found)))
            for weight, hard, lr in found:
                assert weight.shape == hard.shape and lr == 1e-2 and hard.unique(dim=None).numel() < weight.numel()
            assert loop.lr(found[0][0]) == 1e-2

    calls = []
    run([Look()])
    assert calls[:4] == [("start", 0), ("before", 0.1), ("loss", 4), ("after", 14)] and calls[-3] == ("before", 0.9)


def test_a_regulariser_is_part_of_the_loss():
    class Decay(Tactic):
        def loss(self, loop, loss, batch):
            return loss + sum(p.square().sum() for p in loop.names)

    plain, more = run(scheme=None), run([Decay()], scheme=None)
    total = sum(float(p.square().sum()) for p in llama().parameters())
    assert more[1].loss[0] == pytest.approx(plain[1].loss[0] + total, rel=1e-4)
