"""The top eigenvalue is that of the whole Hessian, at the quantized point, and leaves no trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llama, quantized, task
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification

from qatlas.core.error import QuantError, RunError
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.layers.adapter import Lora
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.rules import Rule, quantize
from qatlas.train.sharpness import sharpness, trace

W4, A8 = Quant(Uniform(4), PerTensor(), AbsMax()), Quant(Uniform(8), PerTensor(), AbsMax())


class Valley(nn.Module):
    """x^T A x / 2 for a symmetric A of given eigenvalues."""

    def __init__(self, spectrum, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=draw, dtype=torch.float64))[0]
        self.a = turn @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ turn.T
        self.x = nn.Parameter(torch.randn(len(spectrum), generator=draw, dtype=torch.float64))


def valley(model, batch):
    return (batch["c"] * (model.x @ model.a @ model.x) / 2).mean()


ONE = [{"c": torch.ones(1, dtype=torch.float64)}]


@pytest.mark.parametrize("spectrum, value", [([5.0, 3.0, 1.0], 5.0), ([-5.0, 4.0, 1.0, 0.0], -5.0), ([2.0], 2.0), ([0.0, 0.0], 0.0),
                                             ([3.0, 3.0, 1.0], 3.0)])
def test_a_known_spectrum(spectrum, value):
    assert sharpness(Valley(spectrum), valley, ONE, tolerance=1e-9) == pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("spectrum", [[5.0, 3.0, 1.0], [-5.0, 4.0, 1.0, 0.0], [2.0]])
def test_the_trace_is_the_sum_of_the_spectrum(spectrum):
    assert trace(Valley(spectrum), valley, ONE, probes=3000) == pytest.approx(sum(spectrum), abs=0.3)
    assert trace(Valley(spectrum), valley, ONE, probes=3) == trace(Valley(spectrum), valley, ONE, probes=3)


def test_the_trace_is_of_the_quantized_point_and_leaves_nothing_behind():
    model, subject = quantized(llama()), task()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    value = trace(model, subject.loss, [subject.batch(0)], probes=2)
    hard = llama()
    hard.load_state_dict({name: t for name, t in before.items() if "quantizer" not in name})
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, QLinear)):
        hard.get_submodule(name).weight.data = layer.hard()
    assert value == pytest.approx(trace(hard, subject.loss, [subject.batch(0)], probes=2), rel=1e-4)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(RunError, match="0 batches"):
        trace(model, subject.loss, [])


def test_two_signs_of_one_size_are_told_apart():
    """Where the Rayleigh quotient would stand still between them."""
    assert abs(sharpness(Valley([4.0, -4.0, 1.0]), valley, ONE, tolerance=1e-9)) == pytest.approx(4.0, rel=1e-6)
    assert sharpness(Valley([4.0, -4.2, 1.0]), valley, ONE, tolerance=1e-9) == pytest.approx(-4.2, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.7, 0.7), min_size=1, max_size=6), st.sampled_from([-1.0, 1.0]), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_any_spectrum_with_a_gap(rest, sign, size, seed):
    spectrum = [sign * size, *(size * r for r in rest)]
    assert sharpness(Valley(spectrum, seed), valley, ONE, tolerance=1e-8, seed=seed) == pytest.approx(sign * size, rel=1e-4)


def test_the_mean_over_batches():
    batches = [{"c": torch.full((1,), c, dtype=torch.float64)} for c in (1.0, 4.0)]
    assert sharpness(Valley([2.0, 1.0]), valley, batches, tolerance=1e-9) == pytest.approx(2 * 2.5)


def test_a_loss_without_curvature_is_flat():
    assert sharpness(Valley([1.0]), lambda model, batch: model.x.sum(), ONE) == 0.0


def bert(implementation, dtype=torch.float64):
    torch.manual_seed(3)
    config = BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8,
                        num_labels=3, attn_implementation=implementation, initializer_range=0.4)
    model = BertForSequenceClassification(config).to(dtype).train()
    for name, parameter in model.named_parameters():              # a Hessian that is small enough to be made whole
        parameter.requires_grad_("attention" in name or "classifier" in name)
    ids = torch.randint(1, 12, (4, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def said(model, batch):
    return model(**batch).loss


def whole(model, batch, weights=None):
    """The top eigenvalue of torch's own dense Hessian over the trained parameters, at `weights` where given."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and "quantizer" not in name]
    point = [(weights or {}).get(name, model.get_parameter(name)).detach() for name in names]

    def value(flat):
        pieces = flat.split([p.numel() for p in point])
        given = {name: piece.view_as(p) for name, piece, p in zip(names, pieces, point, strict=True)}
        return functional_call(model, given, kwargs=batch).loss

    flat = torch.cat([p.flatten() for p in point])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dense = torch.autograd.functional.hessian(value, flat)
    torch.testing.assert_close(dense, dense.T)
    return max(torch.linalg.eigvalsh(dense).tolist(), key=abs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_transformer_against_the_dense_hessian(implementation):
    model, batch = bert(implementation)
    expected = whole(model.eval(), batch)
    assert abs(expected) > 0.1
    assert sharpness(model.train(), said, [batch], tolerance=1e-7, steps=2000) == pytest.approx(expected, rel=1e-4)


def test_the_point_is_where_the_layers_compute():
    """With quantizers of weights, activations and probabilities: as the plain model whose weights are the hard ones."""
    plain, batch = bert("eager")
    at_master = whole(plain.eval(), batch)
    model = quantize(plain, [Rule("*.attention.*.dense", weight=W4, input=A8), Rule("*.query", weight=W4), Rule("*.value", weight=W4),
                             Rule("@attention:probabilities", signal=Quant(Uniform(8, False), PerTensor(), AbsMax()))])
    hard = {f"{name}.weight": layer.hard() for name, layer in model.named_modules() if isinstance(layer, QLinear) and layer.weight_quantizer}
    assert len(hard) == 3
    expected = whole(bert("eager")[0].eval(), batch, hard)
    assert abs(expected / at_master - 1) > 0.01
    assert sharpness(model, said, [batch], tolerance=1e-7, steps=2000) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("keep", ["each", "buffer", "recompute"])
def test_the_model_is_as_before(keep):
    model, subject = quantized(llama(dropout=0.3), "w4a8", keep=keep).train(), task()
    batch = subject.batch(0)
    model.model.layers[1].eval()
    subject.loss(model, batch).backward()
    state = {name: (t.clone(), t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    found = sharpness(model, subject.loss, [batch])
    assert torch.equal(random, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    for name, t in model.state_dict(keep_vars=True).items():
        assert torch.equal(t, state[name][0]) and (t.data_ptr(), t._version) == state[name][1:], name
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    assert all(q.on for q in model.modules() if type(q).__name__ == "Quantizer")
    fresh = quantized(llama(), "w4a8")
    assert torch.equal(subject.loss(model.eval(), batch), subject.loss(fresh.eval(), batch))
    assert found == pytest.approx(sharpness(fresh, subject.loss, [batch]), rel=1e-4)


def test_masters_come_back_after_an_error():
    model, subject = quantized(llama(), "w2"), task()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RunError, match="has not settled to 1e-12 of itself in 2 steps; the last values are"):
        sharpness(model, subject.loss, [subject.batch(0)], steps=2, tolerance=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_has_no_hessian_is_refused():
    model, subject = quantized(llama(), "w2"), task()
    with pytest.raises(RunError, match="and 0 batches"):
        sharpness(model, subject.loss, [])
    with pytest.raises(RunError, match="over 0 parameters"):
        sharpness(llama().requires_grad_(False), subject.loss, [subject.batch(0)])
    steps = quantize(llama(), [Rule("*.mlp.*", weight=Quant(Uniform(4), PerTensor(), Learned()))])
    for name, parameter in steps.named_parameters():              # a scale is no place where the loss bends: nothing depends on it
        parameter.requires_grad_(name.endswith("scale"))
    with pytest.raises(RunError, match="over 0 parameters"):
        sharpness(steps, subject.loss, [subject.batch(0)])
    with pytest.raises(RunError, match="the loss is nan"):
        sharpness(model, lambda m, b: subject.loss(m, b) * float("nan"), [subject.batch(0)])
    with pytest.raises(RunError, match="is not finite: the loss has no second derivative"):
        sharpness(Valley([1.0]), lambda m, b: (m.x - m.x.detach()).abs().pow(1.5).sum(), ONE)
    adapted = nn.Sequential(QLinear.of(nn.Linear(8, 8), Slots(weight=W4, adapter=Lora(2))))
    with pytest.raises(QuantError, match="0 has an adapter.*merge it first"):
        sharpness(adapted, lambda m, b: m(b["x"]).sum(), [{"x": torch.ones(1, 8)}])
    packed = nn.Sequential(QLinear.of(nn.Linear(8, 8), Slots(weight=W4)).pack())
    with pytest.raises(QuantError, match="0 is packed"):
        sharpness(packed, lambda m, b: m(b["x"]).sum(), [{"x": torch.ones(1, 8)}])
