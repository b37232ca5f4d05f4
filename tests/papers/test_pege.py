"""PEGE: the exact checks of its sheet on tensors, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import QatlasError, RunError
from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMean, Learned
from qatlas.core.transform import Hadamard
from qatlas.export import target
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.pack import checkpoint, pack
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule
from qatlas.papers.lsq import lsq
from qatlas.papers.pege import Curriculum, Mixing, Progressive, drawn, pege
from qatlas.train import data
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
LSQ = Quant(Uniform(2), PerChannel(), Learned(AbsMean(2.0, per_root=True), factor=1.0), Clip())
IDS = torch.arange(24).view(2, 12) % 32


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def mixing(x, share, order="fixed", scope="round", **more):
    q = Mixing(Progressive.of(LSQ, order, scope)).double().initialise(x)
    q.share, q.salt = share, 7
    for name, value in more.items():
        setattr(q, name, value)
    return q.train()


def pulled(q, x, g):
    x = x.clone().requires_grad_()
    y = q(x)
    y.backward(g)
    return y.detach(), x.grad, None if q.scale.grad is None else q.scale.grad


# ---- one quantizer ---------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds)
def test_all_rounded_and_no_pull_is_the_plain_quantizer_bit_for_bit(seed):
    x, g = draw(seed, 6, 40), draw(seed + 1, 6, 40)
    for ours, theirs in zip(pulled(mixing(x, 1.0), x, g), pulled(Quantizer(LSQ).double().initialise(x), x, g), strict=True):
        assert torch.equal(ours, theirs)


@few
@given(seeds)
def test_nothing_rounded_is_the_full_or_the_clipped_tensor_bit_for_bit(seed):
    x, g = draw(seed, 6, 40), draw(seed + 1, 6, 40)
    y, dx, _ = pulled(mixing(x, 0.0, scope="clip"), x, g)
    assert torch.equal(y, x) and torch.equal(dx, g)
    q = mixing(x, 0.0)
    y, dx, ds = pulled(q, x, g)
    s, u = q.scale.detach()[:, None], x / q.scale.detach()[:, None]
    inside = (u >= -2) & (u <= 1)
    torch.testing.assert_close(y, s * u.clamp(-2, 1))
    assert torch.equal(dx, g * inside)
    torch.testing.assert_close(ds, (g * u.clamp(-2, 1) * ~inside).sum(1).to(ds))


@few
@given(seeds, st.sampled_from(["round", "clip"]), st.floats(0.1, 0.9))
def test_gradients_are_those_of_the_mixed_tensor(seed, scope, share):
    """With the mask held: the sum of what the rounded and the waiting elements say, the step's rounding part from rounded ones alone."""
    x, g = draw(seed, 6, 40), draw(seed + 1, 6, 40)
    q = mixing(x, share, scope=scope)
    mask = q.mask(x)
    y, dx, ds = pulled(q, x, g)
    plain = Quantizer(LSQ).double().initialise(x)
    rounded, dx_r, ds_r = pulled(plain, x, g * mask)
    waiting, dx_w, ds_w = pulled(mixing(x, 0.0, scope=scope), x, g * ~mask)
    assert torch.equal(y, torch.where(mask, rounded, waiting))
    torch.testing.assert_close(dx, dx_r + dx_w)
    torch.testing.assert_close(ds, ds_r if ds_w is None else ds_r + ds_w)


@few
@given(seeds, st.floats(0.0, 1.0), st.floats(0.01, 10))
def test_the_pull_is_the_gradient_of_half_the_squared_error(seed, share, u):
    x, g = draw(seed, 6, 40), draw(seed + 1, 6, 40)
    q = mixing(x, share, pull=u, relative=False)
    mask, without = q.mask(x), pulled(mixing(x, share), x, g)
    y, dx, ds = pulled(q, x, g)
    held, leaf = q.hard(x), x.clone().requires_grad_()
    keep = torch.ones_like(x) if mask is None else mask
    (u / 2 * ((leaf - held) * keep).square().sum()).backward()
    torch.testing.assert_close(dx, without[1] + leaf.grad)
    assert torch.equal(y, without[0]) and torch.equal(ds, without[2])


def test_a_relative_pull_is_a_share_of_the_gradient():
    x, g, q = draw(0, 6, 40), 1e-5 * draw(1, 6, 40), draw(2, 6, 40).round()
    for mask in (None, draw(3, 6, 40) > 0):
        assert (drawn(g, x, q, mask, 0.1, True).norm() / g.norm()).item() == pytest.approx(0.1)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(drawn(g.to(dtype) * 1e6, x.to(dtype), x.to(dtype), None, 0.1, True), torch.zeros(6, 40, dtype=dtype))
    assert not drawn(0 * g, x, q, None, 0.1, True).any()


def test_a_pull_alone_brings_every_element_to_its_level():
    x = draw(4, 6, 40)
    q = mixing(x, 1.0, pull=1.0, relative=False)
    errors = []
    for _ in range(60):
        leaf = x.clone().requires_grad_()
        q(leaf).backward(torch.zeros_like(x))
        errors.append((x - q.hard(x)).square().mean().item())
        x = x - 0.1 * leaf.grad
    assert all(later <= earlier for earlier, later in pairwise(errors)) and errors[-1] < 1e-4 * errors[0]


def test_a_fixed_order_grows_and_a_fresh_one_is_drawn_in_each_step():
    x = draw(5, 100, 100)
    fixed, fresh = mixing(x, 0.0), mixing(x, 0.0, order="fresh")
    before = torch.zeros(100, 100, dtype=torch.bool)
    for step, share in enumerate((0.2, 0.5, 0.9)):
        for q in (fixed, fresh):
            q.share, q.step = share, step
            assert q.mask(x).double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share)) / 100)
            assert torch.equal(q.mask(x), q.mask(x)), "a recomputed block draws the same"
        assert (before <= fixed.mask(x)).all() and not torch.equal(fixed.mask(x), fresh.mask(x))
        before = fixed.mask(x)
    fresh.share, fresh.step = 0.5, 0
    first = mixing(x, 0.5, order="fresh").mask(x)
    assert torch.equal(fresh.mask(x), first)
    fresh.step = 1
    assert not torch.equal(fresh.mask(x), first)


def test_eval_mode_and_codes_round_everything():
    x = draw(6, 4, 20)
    q = mixing(x, 0.3, pull=1.0)
    whole = Quantizer(LSQ).double().initialise(x)(x)
    assert not torch.equal(q(x), whole) and torch.equal(q.hard(x), whole) and torch.equal(q.quantize(x).dequantize().double(), whole)
    assert torch.equal(q.eval()(x), whole)
    assert from_json(q.quant.to_json()) == q.quant


@pytest.mark.parametrize("keep", ["each", "buffer"])
def test_a_kept_weight_is_mixed_alike(keep):
    torch.manual_seed(0)
    layer = QLinear.of(nn.Linear(32, 8), Slots(Progressive.of(LSQ, "fixed", "round"), keep=keep)).train()
    layer.weight_quantizer.share, x = 0.5, torch.randn(3, 32)
    once, again = layer(x), layer(x)
    w = torch.where(layer.weight_quantizer.mask(layer.weight), layer.hard(), layer.weight_quantizer.waiting(layer.weight, None))
    assert torch.equal(once, again) and torch.equal(once, nn.functional.linear(x, w, layer.bias))


# ---- the curriculum --------------------------------------------------------------------------------------------------------------------------------

@few
@given(st.floats(1.5, 100), st.floats(0, 0.9), st.floats(0.1, 1.0), st.integers(5, 300))
def test_the_share_starts_where_it_is_told_rises_ever_slower_and_ends_at_one(base, start, ramp, steps):
    curriculum = Curriculum(ramp, base=base, start=start)
    shares = [curriculum.share(step, steps) for step in range(steps)]
    assert shares[0] == pytest.approx(start) and shares[-1] == 1.0 and all(share == 1 for step, share in enumerate(shares) if step >= ramp * steps)
    rises = [b - a for a, b in pairwise(shares)]
    assert all(rise >= -1e-9 for rise in rises)
    until = min(ramp * steps, steps - 1)
    along = [rise for step, rise in enumerate(rises) if step + 1 <= until]
    assert all(b <= a + 1e-9 for a, b in pairwise(along)), "concave"
    if start < 1e-9:
        assert shares[1] == pytest.approx(min(1.0, math.log1p((base - 1) / until) / math.log(base)))


def test_the_pull_grows_by_its_factor_to_what_it_was_told():
    forces = [Curriculum(pull=0.1, growth=100).force(step, 10) for step in range(10)]
    assert forces[-1] == pytest.approx(0.1) and forces[0] == pytest.approx(0.1 * 100 ** -0.9)
    ratios = [b / a for a, b in pairwise(forces)]
    assert all(ratio == pytest.approx(ratios[0]) for ratio in ratios)


@pytest.mark.parametrize("wrong", [{"ramp": 1.5}, {"start": -0.1}, {"base": 1.0}, {"pull": -1.0}, {"growth": 0.5}])
def test_a_curriculum_that_cannot_be(wrong):
    with pytest.raises(RunError, match="from 0 to 1"):
        Curriculum(**wrong)


# ---- the function ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inputs", [{}, {"input_bits": 4, "static": True}, {"input_bits": 4}])
def test_without_ramp_and_pull_it_is_lsq_bit_for_bit(inputs):
    ours = pege(tiny_llama(), lm(), bits=2, ramp=0.0, pull=0.0, lr=1e-2, steps=3, **inputs)
    theirs = lsq(tiny_llama(), lm(), bits=2, lr=1e-2, steps=3, **inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    for more in ({"pull": 0.0}, {"ramp": 0.0}):
        other = pege(tiny_llama(), lm(), bits=2, lr=1e-2, steps=3, **inputs, **more)
        assert not torch.equal(other.model.layers[0].mlp.up_proj.weight, ours.model.layers[0].mlp.up_proj.weight)


def test_weights_and_inputs_are_let_in_together_and_all_is_rounded_at_the_end():
    seen = []

    class Look(Tactic):
        def after(self, loop):
            found = [m for m in loop.model.modules() if isinstance(m, Mixing)]
            seen.append(({m.share for m in found}, {m.quant.order for m in found}, len({m.salt for m in found})))

    task = lm()
    task.run.tactics = (Look(),)
    model = pege(tiny_llama(), task, bits=2, input_bits=4, static=True, steps=8, ramp=0.5)
    assert [len(shares) for shares, _, _ in seen] == [1] * 8 and {n for _, _, n in seen} == {28}
    assert [round(next(iter(shares)), 2) for shares, _, _ in seen] == [0, 0.51, 0.74, 0.89, 1, 1, 1, 1]
    assert seen[0][1] == {"fixed", "fresh"}
    for layer in quantized(model).values():
        assert len(layer.quantize().codes.unique()) <= 4 and not layer.training


def test_a_weight_is_pulled_once_a_step_however_many_micro_batches_there_are():
    ends = [pege(tiny_llama(), lm(run=Run(progress=False, micro=micro)), bits=2, pull=1.0, steps=2, lr=1e-2).state_dict() for micro in (None, 1)]
    for a, b in zip(*(end.values() for end in ends), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


def test_the_pull_brings_weights_nearer_to_their_levels():
    off = {}
    for pull in (0.0, 1.0):
        model = pege(tiny_llama(), lm(), bits=2, ramp=0.0, pull=pull, growth=1.0, steps=20, lr=3e-3)
        apart = [((x.weight - x.hard()).square().mean().sqrt() / x.weight_quantizer.scale.mean()).item() for x in quantized(model).values()]
        off[pull] = sum(apart) / len(apart)
    assert off[1.0] < 0.9 * off[0.0]


@pytest.mark.parametrize("bits", [1.58, 2, 4])
def test_it_trains_for_the_target_and_packs_for_it(bits):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=64))
    model = pack(pege(model, lm(target="gguf:q4_0"), bits=bits, steps=2))
    form, kind = target("gguf:q4_0")
    assert list(form.plan(checkpoint(model), kind).values()).count("Q4_0") == 7


@pytest.mark.parametrize("wrong, words", [({"bits": 1}, "1.58 or of 2 to 8"), ({"order": "nearest"}, "fixed or fresh"),
                                          ({"scope": "all"}, "round or clip"), ({"ramp": 2.0}, "from 0 to 1"), ({"input_bits": 1}, "2 to 8")])
def test_arguments_that_cannot_work(wrong, words):
    with pytest.raises(QatlasError, match=words):
        pege(tiny_llama(), lm(), **{"steps": 1, **wrong})


def test_a_transform_is_refused():
    with pytest.raises(RunError, match="a transform or an adapter"):
        pege(tiny_llama(), lm(extra_rules=(Rule("*.up_proj", transform=Hadamard()),)), steps=1)


@pytest.mark.parametrize("order", ["fixed", "fresh"])
def test_it_resumes_mid_ramp_to_the_same_bits(tmp_path, order):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return pege(tiny_llama(), task, bits=2, input_bits=4, static=True, order=order, steps=6, lr=1e-2)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=2)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
