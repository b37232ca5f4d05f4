"""TernaryBERT: its numbers, its losses, LAT; each exact check of its sheet."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import bert, pair, sentences
from tiny import Stop
from tiny import llama as tiny_llama
from tiny import task as text

from qatlas.core.error import RuleError
from qatlas.core.grain import PerChannel, PerTensor, PerToken
from qatlas.core.grid import Ternary
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMean
from qatlas.model.pack import pack
from qatlas.model.quantized import quantized, quantizers
from qatlas.papers.ternarybert import Curvature, Curved, Lat, LossAware, ternarize, ternarybert
from qatlas.train.imitate import Imitation
from qatlas.train.run import Run
from qatlas.train.teacher import Teacher, full_precision

TWN = Quant(Ternary(0.7), PerTensor(), AbsMean(), refit=True, clip=2.5)
PLAIN = {"loss_aware": False, "rows": False, "embeddings": None, "input_bits": 8, "minmax": False, "per_token": None, "clip": 2.5}
seeds = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(-2.4, 2.4)


@few
@given(seeds, st.floats(0.01, 1.0))
def test_twn_is_ternary_least_squares_equivariant_and_idempotent(seed, c):
    w = draw(seed, 6, 17)
    y = TWN.hard(w)
    assert len(y.unique()) <= 3 and torch.equal(y.unique(), -y.unique().flip(0))
    b = y.sign()
    alpha = y.abs().max()
    assert abs(float(((w - alpha * b) * b).sum())) < 1e-9
    torch.testing.assert_close(TWN.hard(c * w), c * y)
    torch.testing.assert_close(TWN.hard(y), y)


def test_the_gradient_ends_at_the_clip():
    w = torch.tensor([[-3.0, -2.5, -2.4, 0.0, 2.4999, 2.5, 9.0]], dtype=torch.float64, requires_grad=True)
    Quantizer(TWN)(w).backward(torch.ones_like(w))
    assert w.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    assert torch.equal(TWN.hard(w.detach()), TWN.hard(w.detach().clamp(-2.5, 2.5)))


@few
@given(seeds)
def test_lat_lowers_its_objective_turn_by_turn_and_starts_at_twn(seed):
    w, d = draw(seed, 4, 33), draw(seed + 1, 4, 33).abs() + 1e-3

    def objective(y, weight):
        return (weight * (y - w).square()).sum(-1)

    twn = TWN.but(grain=PerChannel(), clip=None)
    same = [Lat(grain=PerChannel(), scale=LossAware(turns)).hard(w) for turns in range(6)]
    values = [objective(twn.hard(w), torch.ones_like(w)), *(objective(y, torch.ones_like(w)) for y in same)]
    assert all((after <= before + 1e-12).all() for before, after in pairwise(values[1:]))
    assert (values[-1] <= values[0] + 1e-12).all()
    last = None
    for turns in range(6):
        quantizer = Curved(Lat(grain=PerChannel(), scale=LossAware(turns)))
        quantizer.curvature = d
        now = objective(quantizer(w), d)
        assert last is None or (now <= last + 1e-12).all()
        last = now


def test_curvature_reaches_the_quantizers_and_comes_back_after_a_stop(tmp_path):
    def trained(out, resume=False, at=None):
        run = Run(out, resume=resume, save_every=1, progress=False)
        run.tactics = (Stop(at),)
        return ternarybert(bert(), sentences(run), loss_aware=True, steps=4, lr=1e-3)

    whole = trained(tmp_path / "a")
    layers = list(quantized(whole).values())
    assert all(isinstance(layer.weight_quantizer, Curved) for layer in layers)
    moved = [layer for layer in layers if layer.weight_quantizer.curvature.unique().numel() > 1]
    assert len(moved) == len(layers)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", at=2)
    again = trained(tmp_path / "b", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert Curvature.idle().eps == Curvature().eps


def test_what_is_quantized_and_what_is_not():
    model, task = bert(), sentences()
    ternarize(model, task, **PLAIN)
    layers = quantized(model)
    assert set(layers) == {"bert.embeddings.word_embeddings", "bert.pooler.dense", *(
        f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"))}
    assert layers["bert.embeddings.word_embeddings"].weight_quantizer.quant.grain == PerChannel()
    assert all(layer.weight_quantizer.quant.grain == PerTensor() for name, layer in layers.items() if "word" not in name)
    inside = [name for name in quantizers(model) if "self." in name and name.endswith(("query_quantizer", "probabilities_quantizer"))]
    assert len(inside) == 4
    assert layers["bert.pooler.dense"].input_quantizer.quant.grain == PerTensor()


def test_decoders_quantize_per_token_and_leave_tied_embeddings_full():
    model = ternarize(tiny_llama(), text(), **PLAIN)
    assert quantized(model)["model.layers.0.mlp.down_proj"].input_quantizer.quant.grain == PerToken()
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.config.tie_word_embeddings = True
    assert "model.embed_tokens" not in quantized(ternarize(copy.deepcopy(tied), text(), **PLAIN))
    with pytest.raises(RuleError, match="share one weight"):
        ternarize(tied, text(), **(PLAIN | {"embeddings": True}))


def test_the_loss_is_the_teachers_entropy_where_student_and_teacher_agree():
    model, task = bert(), sentences()
    teacher = Teacher.of(model)
    ternarize(model, task, **PLAIN)
    loss = Imitation(task, teacher, model, hidden=1.0, scores=1.0, attended=1.0)
    batch = task.batch(0)
    with full_precision(model):
        said, theirs = teacher.signals(task, batch, loss.read())
        terms = loss.terms(batch, *loss.forward(model, batch, theirs), said, theirs)
        p = said.softmax(-1)
        torch.testing.assert_close(terms.pop("logits"), -(p * p.log()).sum(-1).mean())
        assert all(term < 1e-10 for term in terms.values())
        loss(model, batch).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama"])
def test_it_learns_on_every_kind_of_model(kind, tmp_path):
    model, task = pair(kind, tmp_path)
    task.run = Run(progress=False)
    model = ternarybert(model, task, steps=30, lr=3e-3)
    history = task.run.histories[0].loss
    assert sum(history[-5:]) < sum(history[:5])
    x = {name: value for name, value in task.batch(0).items() if name != "labels"}
    before = model(**x).logits
    assert torch.equal(pack(model)(**x).logits, before)


def test_minmax_rows_and_adamw():
    model = ternarybert(bert(), sentences(), steps=2, minmax=True, rows=True, adamw=True, clip=None)
    layer = quantized(model)["bert.pooler.dense"]
    assert layer.weight_quantizer.quant.grain == PerChannel() and layer.input_quantizer.quant.grid.signed is False


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_in_bf16_is_widened(kind):
    model, task = pair(kind, None)
    model = ternarybert(model.to(torch.bfloat16), task, steps=2)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
