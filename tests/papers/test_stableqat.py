"""StableQAT: the exact checks of its sheet on tensors, and what the paper's function promises on a Llama of two layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama

from qatlas.core.error import QatlasError, QuantError
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerChannel
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMean, Learned
from qatlas.export import target
from qatlas.model.pack import checkpoint, pack
from qatlas.model.quantized import quantized
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.paretoq import of_weight as paretoq_weight
from qatlas.papers.paretoq import paretoq
from qatlas.papers.stableqat import HIGHEST, ROOT, Fourier, of_weight, stableqat
from qatlas.train import data
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
BITS = (1.58, 2, 3, 4)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def pulled(quant, w, g):
    """Values, and the gradients of weight and step."""
    w, q = w.clone().requires_grad_(), Quantizer(quant).initialise(w)
    y = q(w)
    y.backward(g)
    return y.detach(), w.grad, q.scale.grad


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds, st.sampled_from(BITS), st.sampled_from([1, 3]))
def test_amplitude_zero_is_lsq_bit_for_bit(seed, bits, terms):
    w, g = draw(seed, 6, 40, dtype=torch.float32), draw(seed + 1, 6, 40, dtype=torch.float32)
    for ours, theirs in zip(pulled(of_weight(bits, 0.0, terms), w, g), pulled(paretoq_weight(bits, "integer"), w, g), strict=True):
        assert torch.equal(ours, theirs)


@few
@given(seeds, st.sampled_from(BITS))
def test_values_and_the_steps_gradient_know_nothing_of_the_wave(seed, bits):
    w, g = draw(seed, 6, 40, dtype=torch.float32), draw(seed + 1, 6, 40, dtype=torch.float32)
    with_wave, without = pulled(of_weight(bits, 0.21), w, g), pulled(of_weight(bits, 0.0), w, g)
    assert torch.equal(with_wave[0], without[0]) and torch.equal(with_wave[2], without[2]) and not torch.equal(with_wave[1], without[1])


@few
@given(seeds, st.floats(0, HIGHEST))
def test_the_slope_by_its_formula_even_periodic_and_bounded(seed, amplitude):
    u, wave = 3 * draw(seed, 200), Fourier((amplitude,))
    total = amplitude * torch.cos(math.pi * (u + u.round()))
    torch.testing.assert_close(wave.rho(u), (1 - ROOT * total) / (1 + ROOT * total), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wave.rho(u), wave.rho(u + 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wave.rho(u), wave.rho(-u), rtol=1e-9, atol=1e-12)
    c = amplitude * ROOT
    torch.testing.assert_close(wave.rho(torch.tensor([0.0, 2.0, 0.5, 1.5], dtype=torch.float64)),
                               torch.tensor([(1 - c) / (1 + c)] * 2 + [1.0] * 2, dtype=torch.float64))
    assert (wave.rho(u) >= (1 - c) / (1 + c) - 1e-12).all() and (wave.rho(u) <= 1).all()


def test_mean_and_variance_of_the_slope():
    u = torch.linspace(-0.5, 0.5, 200001, dtype=torch.float64)
    rho = Fourier((0.21,)).rho(u)
    assert (rho.mean().item(), rho.var().item()) == (pytest.approx(0.302, abs=1e-3), pytest.approx(0.072, abs=1e-3))
    rho = Fourier((HIGHEST,)).rho(u)
    assert rho.mean().item() == pytest.approx(4 / math.pi - 1, abs=1e-4)
    assert rho.var().item() == pytest.approx(16 / (3 * math.pi) - 16 / math.pi**2, abs=1e-4)
    assert Fourier((0.2866,)).rho(torch.zeros(1)).item() == pytest.approx(-0.12, abs=1e-3)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_slope_is_the_derivative_of_the_turned_series(terms):
    """(x_q - x) / sqrt 2 = -sum A_m / (2 m + 1) sin((2 m + 1) pi (x + x_q)), solved for x_q and differentiated by x, with the A_m that stand in rho.
    rho is that derivative where x_q is the soft stair; the paper then puts the hard one in its place."""
    amplitudes = of_weight(3, 0.2, terms).estimator.amplitudes
    t = torch.linspace(-0.6, 0.6, 25, dtype=torch.float64, requires_grad=True)
    f = -sum(a / (2 * m + 1) * torch.sin((2 * m + 1) * math.sqrt(2) * math.pi * t) for m, a in enumerate(amplitudes))
    (slope,) = torch.autograd.grad(f.sum(), t)
    total = sum(a * torch.cos((2 * m + 1) * math.pi * math.sqrt(2) * t) for m, a in enumerate(amplitudes))
    torch.testing.assert_close((1 + slope) / (1 - slope), (1 - ROOT * total) / (1 + ROOT * total), rtol=1e-9, atol=1e-9)


@few
@given(seeds, st.sampled_from(BITS))
def test_a_weight_hears_the_slope_inside_and_nothing_outside(seed, bits):
    w, g, quant = 2 * draw(seed, 5, 30), draw(seed + 1, 5, 30), of_weight(bits)
    low, high = (-1, 1) if bits == 1.58 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    quantizer = Quantizer(quant).double().initialise(w)
    with torch.no_grad():
        quantizer.scale.mul_(0.5)                                 # so that some lie outside
    w.requires_grad_()
    quantizer(w).backward(g)
    u = w.detach() / quantizer.scale[:, None]
    inside = (u >= low) & (u <= high)
    torch.testing.assert_close(w.grad, g * Fourier((0.21,)).rho(u) * inside)
    assert not inside.all() and inside.any()


def test_half_precision_is_computed_in_full():
    """The cosine of a bf16 place would be off by a tenth."""
    w = draw(0, 4, 64, dtype=torch.bfloat16)
    wide = pulled(of_weight(4), w.float(), torch.ones(4, 64))[1]
    narrow = pulled(of_weight(4), w, torch.ones(4, 64, dtype=torch.bfloat16))[1]
    assert torch.equal(narrow, wide.bfloat16())


def test_where_steps_start():
    w = draw(1, 4, 32)
    for bits, reach in ((1.58, 1), (2, 1), (3, 3), (4, 7)):
        assert torch.equal(Quantizer(of_weight(bits)).initialise(w).scale, (w.abs().amax(1) / reach).float())


# ---- the function ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3])
def test_a_run_of_amplitude_zero_is_a_run_of_lsq_bit_for_bit(bits):
    """ParetoQ's LSQ, from which the authors start, through the papers; the LSQ of lsq.py, which starts elsewhere, with the wave in its Quant."""
    ours = stableqat(tiny_llama(), lm(), bits=bits, amplitude=0.0, lr=1e-2, steps=3)
    theirs = paretoq(tiny_llama(), lm(), bits=bits, grid="integer", lr=1e-2, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    moved = stableqat(tiny_llama(), lm(), bits=bits, lr=1e-2, steps=3)
    assert not torch.equal(moved.model.layers[0].mlp.up_proj.weight, ours.model.layers[0].mlp.up_proj.weight)
    ends = []
    for estimator in (Clip(), Fourier((0.0,))):
        model, lsq = tiny_llama(), Quant(Uniform(bits), PerChannel(), Learned(AbsMean(2.0, per_root=True)), estimator)
        quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=lsq)])
        fit(model, lm(), optimizer=AdamW(lr=1e-2, scale_share=0.01), steps=3)
        ends.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_every_weight_and_step_moves_and_lies_on_integers(bits):
    start = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    model = stableqat(tiny_llama(), lm(), bits=bits, group=8, lr=1e-2, steps=2)
    layers = quantized(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert not torch.equal(layer.weight, start[f"{name}.weight"]) and layer.weight_quantizer.quant.grain == Group(8)
        assert layer.weight_quantizer.quant.grid == (Ternary() if bits == 1.58 else Uniform(bits))


@pytest.mark.parametrize("bits, name", [(1.58, "gguf:q4_0"), (2, "gguf:q4_0"), (3, "gguf:q4_0"), (4, "gguf:q4_0"), (4, "compressed-tensors:w4a16")])
def test_it_trains_for_the_target_and_packs_for_it(bits, name):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=64))
    model = pack(stableqat(model, lm(target=name), bits=bits, steps=2))
    form, kind = target(name)
    assert not hasattr(form, "plan") or len(form.plan(checkpoint(model), kind)) >= 7


@pytest.mark.parametrize("wrong, words", [({"bits": 1}, "ParetoQ's"), ({"bits": 5}, "bits=5"), ({"amplitude": -0.1}, "from 0"),
                                          ({"amplitude": 0.2866}, "run against"), ({"terms": 0}, "at least one"), ({"group": 7}, "7")])
def test_arguments_that_cannot_work(wrong, words):
    with pytest.raises(QatlasError, match=words):
        stableqat(tiny_llama(), lm(), **{"steps": 1, **wrong})


def test_bits_without_a_model():
    with pytest.raises(QuantError, match="1.58, 2, 3 or 4"):
        of_weight(8)


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return stableqat(tiny_llama(), task, lr=1e-2, steps=4)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=2)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
