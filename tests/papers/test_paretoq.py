"""ParetoQ: its grids, thresholds, starts and gradients in closed form, and what the paper promises, seen on a Llama of two layers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import letters
from tiny import llama as tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.core.error import FormatError, QatlasError, QuantError
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerTensor
from qatlas.core.grid import Stretched, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned
from qatlas.export import target
from qatlas.flags import run_parser
from qatlas.model.pack import checkpoint, pack
from qatlas.model.quantized import quantized
from qatlas.papers.paretoq import GRIDS, of_weight, paretoq
from qatlas.train import data, fit
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

CHOICES = [(bits, grid) for bits, grids in GRIDS.items() for grid in grids or (None,)]
QP = {1: 1, 1.58: 1, 2: 1, 3: 3, 4: 7}
TIMES = {(1.58, "stretched"): 1.5}                                # the step that is kept, in alphas: alpha = 1.5 s
each = pytest.mark.parametrize("bits, grid", CHOICES)
seeds = st.integers(0, 2**31)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def wide_llama(width):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=2, max_position_embeddings=64))


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holding(quant, shape, alpha, times=1.0):
    """A quantizer in float64 whose alphas (rows) are given."""
    quantizer = Quantizer(quant).initialise(torch.ones(shape)).double()
    with torch.no_grad():
        quantizer.scale.copy_(alpha.reshape(quantizer.scale.shape) / times)
    return quantizer


def stretched_by_hand(bits, v):
    """SEQ, a number at a time, as the authors write it -> value, inside, the end of the grid on this side."""
    levels = {1.58: 3}.get(bits) or 2**bits
    n, shift = levels / 2, 0.5 if levels % 2 == 0 else 0.0
    return (round(max(-0.99, min(0.99, v)) * n - shift) + shift) / n, abs(v) <= 0.99, math.copysign((levels - 1) / levels, v)


def integer_by_hand(bits, v):
    low, high = (-1, 1) if bits == 1.58 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return round(max(low, min(high, v))), low <= v <= high, low if v < 0 else high


def half_by_hand(bits, v):
    low, high = 0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5
    return max(low, min(high, round(v - 0.5) + 0.5)), abs(v) <= 2 ** (bits - 1), low if v < 0 else high


BY_HAND = {"stretched": stretched_by_hand, "integer": integer_by_hand, "half": half_by_hand}


@each
@settings(max_examples=8, deadline=None)
@given(seeds)
def test_values_and_gradients_are_the_closed_form(bits, grid, seed):
    """In float64, some weights far outside; alphas too small or negative are alphas of 1e-5, and still hear."""
    w, g = rows(seed, 4, 24) * 3, rows(seed + 1, 4, 24)
    alpha = rows(seed + 2, 4).abs() + 0.1
    alpha[3] = -1.0
    times = TIMES.get((bits, grid), 1.0)
    quantizer, leaf = holding(of_weight(bits, grid), w.shape, alpha, times), w.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(g)
    qp = {"half": 2 ** (bits - 1)}.get(grid, QP[bits])
    for i, row in enumerate(w.tolist()):
        a, heard = max(alpha[i].item(), 1e-5), 0.0
        for j, x in enumerate(row):
            v = x / a
            q, inside, end = (math.copysign(1, v), abs(v) <= 1, 0) if bits == 1 else BY_HAND[grid](bits, v)
            assert y[i, j].item() == pytest.approx(a * q, abs=1e-12)
            assert leaf.grad[i, j].item() == (g[i, j].item() if inside else 0)
            heard += g[i, j].item() * (q if bits == 1 else q - v if inside else end)
        assert quantizer.scale.grad[i].item() == pytest.approx(times * heard / math.sqrt(qp * w.numel()), rel=1e-12, abs=1e-12)


@each
def test_the_scale_hears_the_derivative_of_the_surrogate(bits, grid):
    """Finite differences in alpha of alpha (v + stop(q - v)) inside and alpha * end outside: LSQ's story, away from thresholds."""
    w, g, h = rows(3, 2, 40), rows(4, 2, 40), 1e-6
    quant, times = of_weight(bits, grid), TIMES.get((bits, grid), 1.0)
    alpha = torch.tensor([0.7, 1.3], dtype=torch.float64)
    quantizer = holding(quant, w.shape, alpha, times)
    quantizer(w).backward(g)
    s = alpha[:, None] / times
    u = w / s
    v = quant.grid.snap(u)
    inside = u.abs() < -1 if bits == 1 else quant.grid.inside(u, quant.scale.margin)     # a binary value is an end everywhere

    def surrogate(step):
        return torch.where(inside, step * (w / step + (v - u)), step * v)

    slope = (g * (surrogate(s + h) - surrogate(s - h)) / (2 * h)).sum(1) * quant.scale.strength(w.shape, w.shape, quant.grid)
    torch.testing.assert_close(quantizer.scale.grad, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bits, levels", [(1, [-1, 1]), (1.58, [-2 / 3, 0, 2 / 3]), (2, [-0.75, -0.25, 0.25, 0.75]),
                                          (3, list(range(-4, 4))), (4, list(range(-8, 8)))])
def test_levels_and_thresholds_of_the_paper(bits, levels):
    alpha, times = torch.ones(1, dtype=torch.float64), TIMES.get((bits, "stretched"), 1.0)
    line = torch.linspace(-9, 9, 3601, dtype=torch.float64)[None] + 1e-9
    found = holding(of_weight(bits), line.shape, alpha, times).hard(line)
    torch.testing.assert_close(found.unique(), torch.tensor(levels, dtype=torch.float64), rtol=0, atol=1e-12)
    jumps = line[0, 1:][found[0].diff() > 0]
    wanted = {1: [0.0], 1.58: [-1 / 3, 1 / 3], 2: [-0.5, 0, 0.5]}.get(bits) or [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    torch.testing.assert_close(jumps, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=0.0051)


@pytest.mark.parametrize("bits", GRIDS)
def test_starts(bits):
    w = torch.randn(5, 64)
    s = Quantizer(of_weight(bits)).initialise(w).scale
    top = w.abs().amax(1)
    torch.testing.assert_close(s, {1: w.abs().mean(1), 1.58: top * 2 / 3, 2: top, 3: top / 3, 4: top / 7}[bits])
    if bits == 1.58:                                              # thresholds at a third of the largest
        assert torch.equal(of_weight(bits).hard(w) != 0, w.abs() > top[:, None] / 3)


@each
@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(-8, 8))
def test_scaling_weights_and_alpha_scales_values(bits, grid, seed, power):
    w, c = rows(seed, 3, 16), 2.0**power
    quant, alpha = of_weight(bits, grid), rows(seed + 1, 3).abs() + 0.01
    assert torch.equal(holding(quant, w.shape, c * alpha).hard(c * w), c * holding(quant, w.shape, alpha).hard(w))


@each
def test_balanced_grids_are_odd_functions_and_integers_are_not(bits, grid):
    w = rows(0, 3, 64) * 3
    quantizer = holding(of_weight(bits, grid), w.shape, torch.ones(3, dtype=torch.float64))
    assert torch.equal(quantizer.hard(-w), -quantizer.hard(w)) is not (grid == "integer" and bits > 1.58)


def test_ternary_in_steps_is_stretched_ternary():
    """Values, thresholds and the weight's gradient are those of Stretched(3); the step hears 3/2 of what alpha hears."""
    w, g, alpha = rows(0, 4, 300), rows(1, 4, 300), torch.tensor([0.3, 1.0, 2.0, 7.0], dtype=torch.float64)
    plain = Quant(Stretched(3), scale=Learned(AbsMax(reach=1.0), over="tensor", floor=1e-5), estimator=Clip())
    answers = []
    for quant, times in ((plain, 1.0), (of_weight(1.58), 1.5)):
        quantizer, leaf = holding(quant, w.shape, alpha, times), w.clone().requires_grad_()
        y = quantizer(leaf)
        y.backward(g)
        answers.append((y.detach(), leaf.grad, quantizer.scale.grad / times, quantizer.quantize(w).codes))
    (y, dw, ds, codes), (same_y, same_dw, same_ds, same_codes) = answers
    torch.testing.assert_close(y, same_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ds, same_ds, rtol=1e-12, atol=1e-12)
    assert torch.equal(dw, same_dw) and torch.equal(codes, same_codes) and 0 < (dw == 0).float().mean() < 1


def test_gamma_counts_the_whole_matrix():
    """A row's own length would make alpha's learning rate sqrt(rows) times larger."""
    w = rows(0, 16, 32)
    for bits in GRIDS:
        quant = of_weight(bits)
        assert quant.scale.strength(quant.grain.view(w).shape, w.shape, quant.grid) == pytest.approx(1 / math.sqrt(QP[bits] * w.numel()))


def test_a_frozen_step_is_plain_clipped_rounding():
    w, g = rows(0, 3, 50) * 3, rows(1, 3, 50)
    leaf = w.clone().requires_grad_()
    quantizer = holding(of_weight(4), w.shape, torch.full((3,), 0.5, dtype=torch.float64)).requires_grad_(False)
    y = quantizer(leaf)
    y.backward(g)
    assert torch.equal(y, (w / 0.5).round().clamp(-8, 7) * 0.5)
    assert torch.equal(leaf.grad, g * ((w / 0.5 >= -8) & (w / 0.5 <= 7))) and quantizer.scale.grad is None


@pytest.mark.parametrize("bits, grid", [(0, None), (1.5, None), (5, None), (8, None), (1, "stretched"), (1.58, "half"), (2, "float")])
def test_what_the_paper_does_not_speak_of_is_refused(bits, grid):
    with pytest.raises(QuantError, match=f"{bits:g}"):
        paretoq(tiny_llama(), lm(), bits=bits, grid=grid, steps=1)


@pytest.mark.parametrize("arguments", [{"group": 7}, {"steps": 0}, {"warmup": -1.0}])
def test_arguments_that_cannot_work(arguments):
    with pytest.raises(QatlasError):
        paretoq(tiny_llama(), lm(), **{"steps": 1, **arguments})


# ---- on a model ------------------------------------------------------------------------------------------------------------------------------------

def before_and_after(task=None, **arguments):
    """The model, a copy of its parameters before the first step, and the optimizer's groups in the last."""
    seen, groups = {}, []

    class Look(Tactic):
        def start(self, loop):
            seen.update({name: p.detach().clone() for name, p in loop.model.named_parameters()})

        def after(self, loop):
            groups[:] = [dict(group) for group in loop.optimizer.param_groups]

    task = task or lm()
    task.run.tactics = (Look(),)
    return paretoq(tiny_llama(), task, **{"steps": 2, "lr": 1e-3, **arguments}), seen, groups


@each
def test_every_weight_and_every_alpha_moves_on_its_grid(bits, grid):
    model, seen, _ = before_and_after(bits=bits, grid=grid)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, seen[name])]
    layers = quantized(model)
    assert len(layers) == 14 and all("layers" in name for name in layers)
    for name, layer in layers.items():
        q = layer.quantize()
        assert len(q.codes.unique()) <= (3 if bits == 1.58 else 2**bits) and q.grid == of_weight(bits, grid).grid
        moved = (layer.weight_quantizer.scale != seen[f"{name}.weight_quantizer.scale"]).float().mean()
        assert moved > 0.9, f"{name}: {moved:.0%} of the alphas moved"
        assert layer.input_quantizer is None
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding


def test_the_recipe_is_the_papers():
    """No decay, no warm-up, a cosine to zero, one learning rate for weights and alphas."""
    task = lm()
    _, _, groups = before_and_after(task, steps=20, lr=2e-5)
    assert {group["role"] for group in groups} == {"weights", "norms", "scales"}
    assert all(group["base_lr"] == 2e-5 and group["weight_decay"] == 0 and not group.get("relative") for group in groups)
    rates = task.run.histories[0].lr
    assert rates[0] > 0.99 * 2e-5 and rates[-1] < 0.01 * 2e-5 and sorted(rates, reverse=True) == rates


def test_scales_may_learn_in_units_of_their_own_size():
    _, _, groups = before_and_after(scale_lr=0.01)
    scales = [group for group in groups if group["role"] == "scales"]
    assert len(scales) == 14 and all(group["relative"] and group["base_lr"] == 0.01 for group in scales)


@pytest.mark.parametrize("bits, grid", [(1.58, None), (3, "integer")])
def test_groups_share_a_scale_and_the_factor_stays_the_matrixs(bits, grid):
    model, _, _ = before_and_after(bits=bits, grid=grid, group=8)
    for layer in quantized(model).values():
        quant = layer.weight_quantizer.quant
        assert quant.grain == Group(8) and layer.weight_quantizer.scale.numel() == layer.weight.numel() // 8
        assert quant.scale.strength(quant.grain.view(layer.weight).shape, layer.weight.shape, quant.grid) == pytest.approx(
            1 / math.sqrt(QP[bits] * layer.weight.numel()))


def test_distil_learns_from_the_teacher_and_not_from_the_labels():
    losses = {}
    for distil in (False, True):
        task = lm()
        paretoq(tiny_llama(), task, bits=4, distil=distil, steps=1)
        losses[distil] = task.run.histories[0].loss[0]
    assert losses[True] < 0.05 < losses[False]


HELD = [(1, None, "q4_0"), (1.58, None, "q4_0"), (2, None, "q4_0"), (2, "integer", "q4_0"), (2, "half", "q4_0"), (3, None, "q4_0"), (4, None, "q4_0"),
        (3, "stretched", "q4_0"), (4, "stretched", "q8_0"), (1, None, "tq2_0"), (1.58, None, "tq2_0"), (1.58, "integer", "tq2_0")]


@pytest.mark.parametrize("bits, grid, kind", HELD)
def test_a_target_holds_the_trained_numbers(bits, grid, kind, tmp_path):
    """Trained for it, written, and read by the format's own reader: the same values, on the grid that was trained."""
    model = wide_llama(256 if kind == "tq2_0" else 32)
    paretoq(model, lm(target=f"gguf:{kind}"), bits=bits, grid=grid, steps=2, lr=1e-3, scale_lr=0.01)
    hard = {f"{name}.weight": layer.hard() for name, layer in quantized(model).items()}
    for layer in quantized(model).values():
        stored = layer.quantize()
        assert stored.grid == of_weight(bits, grid).grid and torch.equal(stored.steps.half().float(), stored.steps)
    form, name = target(f"gguf:{kind}")
    found = form.read(form.write(checkpoint(pack(model)), tmp_path / "model.gguf", name))
    assert len(hard) == 7 and all(torch.equal(found[key], values) for key, values in hard.items())


@pytest.mark.parametrize("bits, grid, kind", [(2, None, "tq2_0"), (3, None, "tq2_0"), (2, "integer", "tq2_0"), (4, "stretched", "q4_0")])
def test_what_a_target_cannot_hold_is_refused_before_training(bits, grid, kind, monkeypatch):
    monkeypatch.setattr(fit, "_steps", None)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.q_proj.*gguf:" + kind):
        paretoq(wide_llama(256), lm(target=f"gguf:{kind}"), bits=bits, grid=grid)


def test_more_bits_round_less():
    """On one matrix, at the start: each grid of the paper is nearer to the weights than that of fewer bits."""
    w = torch.randn(8, 4096)
    errors = [float((of_weight(bits).hard(w) - w).square().mean()) for bits in (4, 3, 2)]
    assert sorted(errors) == errors
    integers = float((Quant(Uniform(2), scale=AbsMax(reach=1.0)).hard(w) - w).square().mean())
    assert errors[2] < integers                                   # SEQ at the same clip value beats -2 .. 1


def test_the_grain_is_an_argument_and_the_grid_a_flag():
    assert of_weight(2, grain=PerTensor()).grain == PerTensor()
    flags = run_parser("paretoq").parse_args(["--grid", "half", "--bits", "1.58"])
    assert (flags.grid, flags.bits) == ("half", 1.58)
