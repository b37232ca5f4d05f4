"""FPQ: the exact checks of its sheet on tensors, and what the paper's function promises on a Llama of two layers and a small convolutional net."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn

from qatlas.core.error import QuantError, RunError
from qatlas.core.grain import PerTensor, PerToken
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.fpq import Perturbed, apart, channels, fpq, of_input, of_weight, perturb
from qatlas.train import data
from qatlas.train.fit import fit
from qatlas.train.labelled import Images
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling
from qatlas.train.teacher import Teacher


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (40, 6, 6, 3), dtype=np.uint8), y=np.arange(40) % 2)
    return Images(str(tmp_path / "images.npz"), batch=8, run=Run(progress=False))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def ready(bits=4, scale=0.3):
    return Quantizer(of_input(bits)).initialise(torch.linspace(-scale * 7, scale * 8, 16))


# ---- the noise -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_the_noise_has_the_size_of_a_step(noise):
    torch.manual_seed(0)
    quantizer, x = ready(), torch.zeros(200_000)
    s = float(quantizer.scale.detach())
    delta = perturb(x, quantizer, 1.0, noise)
    assert s == pytest.approx(0.3) and float(delta.mean()) == pytest.approx(0, abs=2e-3 * s)
    assert float(delta.var()) == pytest.approx(s**2 / 12, rel=0.02)
    assert (float(delta.abs().max()) <= s / 2) is (noise == "uniform")
    assert not torch.equal(perturb(x, quantizer, 1.0, noise), delta)


def test_it_moves_a_quantized_value_by_at_most_one_step():
    torch.manual_seed(0)
    quantizer, x = ready(), torch.randn(50_000)
    steps = (quantizer(perturb(x, quantizer, 1.0)) - quantizer(x)).detach() / quantizer.scale.detach()
    assert float(steps.abs().max()) <= 1 + 1e-4 and float(steps.abs().max()) > 0.9


def test_the_share_of_perturbed_layers_is_p_and_zero_draws_change_nothing():
    torch.manual_seed(0)
    quantizer, x = ready(), torch.ones(3)
    assert sum(perturb(x, quantizer, 0.3) is not x for _ in range(3000)) / 3000 == pytest.approx(0.3, abs=0.03)
    assert all(perturb(x, quantizer, 0.0) is x for _ in range(50))


def test_noise_pays_for_curvature():
    """E f(x + delta) - f(x) = s^2 / 24 tr H for a quadratic f."""
    torch.manual_seed(0)
    quantizer, n = ready(), 8
    root = torch.randn(n, n)
    hessian, x = root @ root.T, torch.randn(1, n)
    moved = perturb(x.expand(400_000, n).contiguous(), quantizer, 1.0)
    value = 0.5 * ((moved @ hessian) * moved).sum(1).mean() - 0.5 * (x @ hessian @ x.T).squeeze()
    assert float(value) == pytest.approx(0.3**2 / 24 * float(hessian.trace()), rel=0.1)


def test_the_noise_is_a_constant_of_the_gradients():
    quantizer, x = ready(), torch.randn(100, requires_grad=True)
    perturb(x, quantizer, 1.0).backward(torch.ones(100))
    assert torch.equal(x.grad, torch.ones(100)) and quantizer.scale.grad is None


def test_a_step_a_token_makes_noise_a_token():
    torch.manual_seed(0)
    quantizer, x = Quantizer(Quant(Uniform(4), PerToken(), AbsMax())), torch.tensor([[7.0], [0.7]]).expand(2, 1000)
    delta = perturb(x.contiguous(), quantizer, 1.0) - x
    assert [float(row.abs().max()) for row in delta] == [pytest.approx(0.5, rel=0.01), pytest.approx(0.05, rel=0.01)]


# ---- the distillation ------------------------------------------------------------------------------------------------------------------------------

def test_only_the_shape_of_a_channel_counts():
    torch.manual_seed(0)
    y, slope, shift = torch.randn(5, 40), torch.rand(5, 1) + 0.5, torch.randn(5, 1)
    assert float(apart(y, y)) == 0 and float(apart(slope * y + shift, y)) < 1e-9 and float(apart(y, 3 * y - 1)) < 1e-9
    other = torch.randn(5, 40)
    assert float(apart(-y, y)) == pytest.approx(4, rel=1e-3) and float(apart(other, y)) == pytest.approx(2, abs=0.5)
    assert float(apart(other, y, mean=False)) == pytest.approx(200 * float(apart(other, y)), rel=1e-5)
    dead = torch.zeros(5, 40, requires_grad=True)
    apart(dead, y).backward()
    assert dead.grad.isfinite().all()


def test_channels_are_found_where_they_lie():
    image, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 3)
    assert torch.equal(channels(image, True)[1], image[:, 1].flatten()) and channels(image, True).shape == (3, 40)
    assert torch.equal(channels(tokens, False)[2], tokens[..., 2].flatten())
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert torch.equal(channels(tokens, False, mask), torch.stack([tokens[0, 0], tokens[0, 1], tokens[1, 0]]).T)


def test_the_teacher_of_itself_has_nothing_to_say_and_is_never_perturbed(images):
    model = convolutional().eval()
    student = quantize(copy.deepcopy(model), [*keep_full("6"), Rule("*", weight=of_weight(8), input=of_input(8))], images)
    teacher = Teacher.of(student)
    batch = images.batch(0)
    same_one = Perturbed(images, student, teacher, p=0.0)(student, batch)
    assert float(same_one.detach()) == pytest.approx(float(images.loss(student, batch).detach()), abs=1e-6)
    two = [teacher.signals(images, batch, ["0:output"])[1]["0:output"] for _ in range(2)]
    assert torch.equal(*two)
    noisy = Perturbed(images, student, None, p=1.0, csd=0.0)
    assert float(noisy(student, batch).detach()) != float(noisy(student, batch).detach())
    assert torch.equal(student(batch["pixel_values"]), student(batch["pixel_values"])), "outside of the loss nothing is perturbed"


@pytest.mark.parametrize("where", ["before", "behind"])
def test_where_the_noise_enters(images, where):
    student = quantize(convolutional(), [*keep_full("6"), Rule("*", weight=of_weight(8), input=of_input(4))], images).eval()
    seen = []
    student[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole = student[3].product
    student[3].product = lambda x, w: (seen.append(x), whole(x, w))[1]
    torch.manual_seed(0)
    Perturbed(images, student, None, p=1.0, csd=0.0, where=where)(student, images.batch(0))
    entered = seen[1] / student[3].input_quantizer.scale.detach()
    assert bool((entered - entered.round()).abs().max() < 1e-3) is (where == "before")


# ---- the paper -------------------------------------------------------------------------------------------------------------------------------------

def test_without_noise_and_teacher_it_is_the_base():
    model, plain = fpq(tiny_llama(dropout=0.1), lm(), p=0.0, csd=0.0, lr=1e-3, steps=3), tiny_llama(dropout=0.1)
    quantize(plain, [*keep_full("lm_head", "model.embed_tokens"), Rule("*", weight=of_weight(4), input=of_input(4))], lm())
    moving = [name for name, _ in plain.named_parameters() if not name.endswith(".zero")]
    fit(plain, lm(), train=moving, optimizer=AdamW(lr=1e-3, scale_share=0.01), schedule=cosine(0.05), steps=3)
    assert same(model, plain)
    for more in ({"p": 1.0, "csd": 0.0}, {"p": 0.0, "csd": 1.0}):
        assert not same(model, fpq(tiny_llama(dropout=0.1), lm(), lr=1e-3, steps=3, **more))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_steps_learn_and_zero_points_stay(asymmetric):
    task, seen = lm(), {}

    class Look(type(Stop())):
        def start(self, loop):
            seen.update({name: p.detach().clone() for name, p in loop.model.named_parameters()})

    task.run.tactics = (Look(),)
    model = fpq(tiny_llama(), task, asymmetric=asymmetric, p=0.5, lr=1e-3, steps=2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, seen[name])}
    zeros = {name for name in seen if name.endswith(".zero")}
    assert len(zeros) == (28 if asymmetric else 14) and moved == set(seen) - zeros


def test_it_trains_a_convolutional_net(images):
    model = fpq(convolutional(), images, bits=2, input_bits=4, p=0.5, steps=3)
    assert len(quantized(model)) == 2 and model[3].input_quantizer.quant == of_input(4) and of_input(4).grain == PerTensor()
    assert float(model[3].input_quantizer.zero) == 0, "what a ReLU gives has its zero at the lowest code"
    summed = fpq(convolutional(), images, bits=2, csd_mean=False, noise="gaussian", where="behind", steps=2)
    assert all(p.isfinite().all() for p in summed.parameters())


@pytest.mark.parametrize("wrong, kind, words", [({"bits": 1}, QuantError, "2 to 8"), ({"input_bits": 9}, QuantError, "2 to 8"),
                                                ({"p": 1.5}, RunError, "a probability"), ({"csd": -1.0}, RunError, "0 or more"),
                                                ({"noise": "pink"}, RunError, "uniform or gaussian"), ({"where": "in"}, RunError, "before or behind"),
                                                ({"input_bits": None}, RunError, "give input_bits")])
def test_what_cannot_work_is_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        fpq(tiny_llama(), lm(), steps=1, **wrong)


def test_noise_without_quantized_inputs_is_refused():
    model = quantize(tiny_llama(), [Rule("*proj", weight=of_weight(4))])
    with pytest.raises(RunError, match="no layer has a quantized input"):
        Perturbed(lm(), model, None, csd=0.0)


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop_at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop_at),)
        return fpq(tiny_llama(), task, p=0.5, lr=1e-3, steps=4)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=2)
    assert same(whole, one(tmp_path / "halted", resume=True))
